/*
 * Kills the process that it is preloaded into before its Nth change of the kernel's networking.
 *
 * A change is one system call that sends a netlink message which is no question: an nftables batch,
 * or a policy rule or route that is made or removed. N is KILL_BEFORE; each change that is let
 * through is a line of the file KILL_COUNT.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

static int changes(int fd, const void *data, size_t size) {
    const struct nlmsghdr *message = data;
    int protocol = -1;
    socklen_t length = sizeof(protocol);
    if (size < sizeof(*message) ||
        getsockopt(fd, SOL_SOCKET, SO_PROTOCOL, &protocol, &length))
        return 0;
    if (protocol == NETLINK_NETFILTER)
        return message->nlmsg_type == NFNL_MSG_BATCH_BEGIN;
    switch (message->nlmsg_type) {
    case RTM_NEWRULE:
    case RTM_DELRULE:
    case RTM_NEWROUTE:
    case RTM_DELROUTE:
        return protocol == NETLINK_ROUTE;
    }
    return 0;
}

static void count(int fd, const void *data, size_t size) {
    static int number;
    int netlink = 0;
    socklen_t length = sizeof(netlink);
    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &netlink, &length) || netlink != AF_NETLINK)
        return;
    if (!changes(fd, data, size))
        return;
    if (++number == atoi(getenv("KILL_BEFORE")))
        kill(getpid(), SIGKILL);
    int file = open(getenv("KILL_COUNT"), O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (write(file, ".\n", 2) != 2)
        abort();
    close(file);
}

ssize_t send(int fd, const void *data, size_t size, int flags) {
    count(fd, data, size);
    return sendto(fd, data, size, flags, 0, 0);
}

ssize_t sendto(int fd, const void *data, size_t size, int flags, const struct sockaddr *to,
               socklen_t length) {
    ssize_t (*next)(int, const void *, size_t, int, const struct sockaddr *, socklen_t) =
        dlsym(RTLD_NEXT, "sendto");
    if (to)
        count(fd, data, size);
    return next(fd, data, size, flags, to, length);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    ssize_t (*next)(int, const struct msghdr *, int) = dlsym(RTLD_NEXT, "sendmsg");
    if (message->msg_iovlen)
        count(fd, message->msg_iov[0].iov_base, message->msg_iov[0].iov_len);
    return next(fd, message, flags);
}
