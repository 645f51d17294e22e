/*
 * Load for tests of attribution: processes that live for about a millisecond.
 *
 *   short_lives client NONCE ADDRESS PORT SOURCE_PORT reset|talk
 *       connects; `reset` aborts at once, `talk` sends the nonce and waits until it comes back
 *   short_lives spawn FIRST COUNT STEP ADDRESS PORT
 *       runs a client for every STEP-th nonce from FIRST on, each as a process of its own; nonce N
 *       uses source port 2000 + N; even ones reset. Prints "NONCE PID" for each that succeeded.
 *   short_lives echo PORT
 *       echoes on both address families until it is ended
 *   short_lives rate ADDRESS PORT PER_SECOND SECONDS
 *       connects and aborts at a fixed rate from one process; prints how many
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int fail(const char *what) {
    fprintf(stderr, "short_lives: %s: %s\n", what, strerror(errno));
    return 1;
}

/* Fills in an address; returns its size. */
static socklen_t address(struct sockaddr_storage *out, const char *text, int port) {
    memset(out, 0, sizeof(*out));
    if (strchr(text, ':')) {
        struct sockaddr_in6 *six = (void *)out;
        six->sin6_family = AF_INET6;
        six->sin6_port = htons(port);
        inet_pton(AF_INET6, text, &six->sin6_addr);
        return sizeof(*six);
    }
    struct sockaddr_in *four = (void *)out;
    four->sin_family = AF_INET;
    four->sin_port = htons(port);
    inet_pton(AF_INET, text, &four->sin_addr);
    return sizeof(*four);
}

static int client(char **argv) {
    struct sockaddr_storage to, from;
    socklen_t size = address(&to, argv[3], atoi(argv[4]));
    address(&from, strchr(argv[3], ':') ? "::" : "0.0.0.0", atoi(argv[5]));
    struct linger abortive = {1, 0};
    struct timeval limit = {20, 0};
    int one = 1, s = socket(to.ss_family, SOCK_STREAM, 0);
    setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    setsockopt(s, SOL_SOCKET, SO_LINGER, &abortive, sizeof(abortive));
    setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    if (bind(s, (void *)&from, size))
        return fail("bind");
    if (connect(s, (void *)&to, size))
        return fail("connect");
    if (!strcmp(argv[6], "reset"))
        _exit(0);
    char back[64];
    size_t length = strlen(argv[2]), got = 0;
    if (send(s, argv[2], length, MSG_NOSIGNAL) != (ssize_t)length)
        return fail("send");
    while (got < length) {
        ssize_t n = recv(s, back + got, sizeof(back) - got, 0);
        if (n <= 0)
            return fail("recv");
        got += n;
    }
    return memcmp(back, argv[2], length) ? fail("echo") : 0;
}

static int reap(long *nonces, pid_t *pids, int *running, int most) {
    while (*running > most) {
        int status, i = 0;
        pid_t ended = waitpid(-1, &status, 0);
        while (pids[i] != ended)
            i++;
        if (status)
            return fail("a client failed");
        printf("%ld %d\n", nonces[i], ended);
        (*running)--;
        pids[i] = pids[*running];
        nonces[i] = nonces[*running];
    }
    return 0;
}

static int spawn(const char *self, char **argv) {
    long first = atol(argv[2]), count = atol(argv[3]), step = atol(argv[4]), nonces[8];
    pid_t pids[8];
    int running = 0;
    char nonce[32], port[32], *none[] = {0};
    for (long n = first; n < count; n += step) {
        snprintf(nonce, sizeof(nonce), "nonce-%ld", n);
        snprintf(port, sizeof(port), "%ld", 2000 + n);
        char *words[] = {
            "short_lives", "client", nonce, argv[5], argv[6], port, n % 2 ? "talk" : "reset", 0};
        if (posix_spawn(&pids[running], self, 0, 0, words, none))
            return fail("posix_spawn");
        nonces[running++] = n;
        if (reap(nonces, pids, &running, 7))
            return 1;
    }
    return reap(nonces, pids, &running, 0);
}

static int echo(char **argv) {
    struct sockaddr_storage any;
    struct epoll_event event = {.events = EPOLLIN}, ready[64];
    socklen_t size = address(&any, "::", atoi(argv[2]));
    int one = 1, poll = epoll_create1(0), listener = socket(AF_INET6, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    if (bind(listener, (void *)&any, size) || listen(listener, 4096))
        return fail("listen");
    event.data.fd = listener;
    epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event);
    puts("ready");
    fflush(stdout);
    for (;;) {
        int n = epoll_wait(poll, ready, 64, -1);
        for (int i = 0; i < n; i++) {
            int s = ready[i].data.fd;
            char data[4096];
            if (s == listener) {
                event.data.fd = accept(listener, 0, 0);
                if (event.data.fd >= 0)
                    epoll_ctl(poll, EPOLL_CTL_ADD, event.data.fd, &event);
                continue;
            }
            ssize_t got = recv(s, data, sizeof(data), 0);
            if (got <= 0 || send(s, data, got, MSG_NOSIGNAL) != got)
                close(s);
        }
    }
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static int rate(char **argv) {
    struct sockaddr_storage to;
    socklen_t size = address(&to, argv[2], atoi(argv[3]));
    double per_second = atof(argv[4]), seconds = atof(argv[5]), began = now();
    struct linger abortive = {1, 0};
    long count = 0;
    while (now() - began < seconds) {
        double ahead = count / per_second - (now() - began);
        if (ahead > 0)
            usleep(ahead * 1e6);
        int s = socket(to.ss_family, SOCK_STREAM, 0);
        setsockopt(s, SOL_SOCKET, SO_LINGER, &abortive, sizeof(abortive));
        if (connect(s, (void *)&to, size))
            return fail("connect");
        close(s);
        count++;
    }
    printf("%ld\n", count);
    return 0;
}

int main(int argc, char **argv) {
    if (argc == 7 && !strcmp(argv[1], "client"))
        return client(argv);
    if (argc == 7 && !strcmp(argv[1], "spawn"))
        return spawn(realpath("/proc/self/exe", 0), argv);
    if (argc == 3 && !strcmp(argv[1], "echo"))
        return echo(argv);
    if (argc == 6 && !strcmp(argv[1], "rate"))
        return rate(argv);
    fprintf(stderr, "see short_lives.c\n");
    return 2;
}
