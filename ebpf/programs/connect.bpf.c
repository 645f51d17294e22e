/*
 * Says who opens a connection: cgroup hooks on connect(), and sock_ops for the event and the SYN
 * option.
 *
 * connect4/connect6 run in the caller and note it under the socket's cookie. TCP_CONNECT_CB comes
 * next, with the local port known and the SYN not sent: the event is written there, so that a
 * reader on this machine always finds it when the connection is accepted. The option goes into the
 * SYN only, towards configured prefixes only, and is left away from the configured retry on: a
 * middlebox may drop SYNs with options that it does not know.
 */
#include "sensor.h"
#include "siphash.h"

#define TCP       6
#define MPTCP     262
#define SYN       2
#define ACK       16
#define CALLBACKS (BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG | BPF_SOCK_OPS_RTO_CB_FLAG)
#define MAPPED    bpf_htonl(0xffff)
/* Stops clang from merging two 4-byte context loads into one of 8 bytes, which the verifier
 * refuses. */
#define SINGLE(x)                                                                                  \
    ({                                                                                             \
        u32 _value = (x);                                                                          \
        asm volatile("" : "+r"(_value));                                                           \
        (u64) _value;                                                                              \
    })

BPF_TABLE("lru_hash", u64, struct ident, sockets, 65536); /* by socket cookie, until established */
BPF_HASH(skipped, u64, u8, 256);                 /* cgroups that are never noted: the gate's own */
BPF_LPM_TRIE(prefixes, struct prefix, u8, 1024); /* destinations that get the option */

struct option {
    u8 kind, length;
    __be16 experiment;
    u64 handle;
    u64 mac;
} __attribute__((packed));

/* A new handle for a process that has none, or whose record says another cgroup or user; and its
 * record. */
static __always_inline u64 rename_process(struct settings *set, struct process *p,
                                          struct ident *id) {
    struct process now = {};
    struct record_head head = {};
    if (p)
        now = *p;
    else
        now.started = bpf_ktime_get_ns();
    now.handle = p ? counted_handle(set) : fallback_handle(set, id->tgid);
    now.cgroup = id->cgroup;
    now.uid = id->uid;
    head.ts = now.started;
    head.handle = now.handle;
    head.parent = p ? p->handle : 0;
    head.cgroup = id->cgroup;
    head.kind = p ? KIND_MOVED : KIND_SEEN;
    head.tgid = id->tgid;
    head.ptgid = now.parent_pid;
    head.uid = id->uid;
    head.gid = id->gid;
    __builtin_memcpy(head.comm, id->comm, sizeof(head.comm));
    note_executable(set, &head);
    if (renamed.update(&head.handle, &head))
        count_lost(LOST_RECORDS);
    if (record_ring.ringbuf_output(&head, sizeof(head), 0))
        count_lost(LOST_RECORD_RING);
    if (processes.update(&id->tgid, &now))
        count_lost(LOST_PROCESSES);
    return now.handle;
}

static __always_inline int note(struct bpf_sock_addr *c) {
    u32 zero = 0;
    struct settings *set = settings.lookup(&zero);
    if (!set || (c->protocol != TCP && c->protocol != MPTCP))
        return 1;
    u64 thread = bpf_get_current_pid_tgid(), user = bpf_get_current_uid_gid();
    struct ident id = {};
    id.cgroup = bpf_get_current_cgroup_id();
    if (skipped.lookup(&id.cgroup))
        return 1;
    id.tgid = thread >> 32;
    id.tid = thread;
    id.uid = user;
    id.gid = user >> 32;
    id.netns = bpf_get_netns_cookie(c);
    bpf_get_current_comm(id.comm, sizeof(id.comm));
    struct process *p = processes.lookup(&id.tgid);
    if (p && p->flags & FLAG_SKIPPED)
        return 1;
    if (p && p->cgroup == id.cgroup && p->uid == id.uid)
        id.handle = p->handle;
    else
        id.handle = rename_process(set, p, &id);
    u64 cookie = bpf_get_socket_cookie(c);
    if (sockets.update(&cookie, &id))
        count_lost(LOST_COOKIES);
    return 1; /* 0 would be EPERM */
}

/* What stays on this host meets no gate. */
int on_connect4(struct bpf_sock_addr *c) {
    return (bpf_ntohl(c->user_ip4) >> 24) == 127 ? 1 : note(c);
}

int on_connect6(struct bpf_sock_addr *c) {
    int local =
        !c->user_ip6[0] && !c->user_ip6[1] && !c->user_ip6[2] && c->user_ip6[3] == bpf_htonl(1);
    return local ? 1 : note(c);
}

/* An IPv6 socket connected to ::ffff:a.b.c.d sends IPv4. */
static __always_inline int is_ipv4(struct bpf_sock_ops *s) {
    if (s->family == 2)
        return 1;
    return !SINGLE(s->remote_ip6[0]) && !SINGLE(s->remote_ip6[1]) &&
           SINGLE(s->remote_ip6[2]) == MAPPED;
}

static __always_inline void connecting(struct bpf_sock_ops *s) {
    u64 cookie = bpf_get_socket_cookie(s);
    struct ident *id = sockets.lookup(&cookie);
    if (!id)
        return;
    u32 source[4] = {0, 0, MAPPED, 0};
    struct prefix to = {128};
    u32 *target = (u32 *)to.address;
    int four = is_ipv4(s);
    if (four) {
        source[3] = SINGLE(s->local_ip4);
        target[2] = MAPPED;
        target[3] = SINGLE(s->remote_ip4);
    } else {
        source[0] = SINGLE(s->local_ip6[0]);
        source[1] = SINGLE(s->local_ip6[1]);
        source[2] = SINGLE(s->local_ip6[2]);
        source[3] = SINGLE(s->local_ip6[3]);
        target[0] = SINGLE(s->remote_ip6[0]);
        target[1] = SINGLE(s->remote_ip6[1]);
        target[2] = SINGLE(s->remote_ip6[2]);
        target[3] = SINGLE(s->remote_ip6[3]);
    }
    if (prefixes.lookup(&to))
        bpf_sock_ops_cb_flags_set(s, s->bpf_sock_ops_cb_flags | CALLBACKS);
    struct connect_event *e = connect_ring.ringbuf_reserve(sizeof(*e));
    if (!e) {
        count_lost(LOST_CONNECT_RING);
        return;
    }
    e->handle = id->handle;
    e->cgroup = id->cgroup;
    e->netns = id->netns;
    e->cookie = cookie;
    e->ts = bpf_ktime_get_ns();
    e->tgid = id->tgid;
    e->tid = id->tid;
    e->uid = id->uid;
    e->gid = id->gid;
    __builtin_memcpy(e->comm, id->comm, sizeof(e->comm));
    __builtin_memcpy(e->source, source, sizeof(e->source));
    __builtin_memcpy(e->target, to.address, sizeof(e->target));
    e->sport = s->local_port;
    e->dport = bpf_ntohl(s->remote_port);
    e->version = four ? 4 : 6;
    connect_ring.ringbuf_submit(e, 0);
}

static __always_inline void write_option(struct bpf_sock_ops *s) {
    u32 zero = 0;
    u64 cookie = bpf_get_socket_cookie(s), word[6] = {};
    struct ident *id = sockets.lookup(&cookie);
    struct settings *set = settings.lookup(&zero);
    struct tcphdr *tcp = (void *)(long)s->skb_data;
    if (!id || !set || (void *)(tcp + 1) > (void *)(long)s->skb_data_end) {
        count_lost(LOST_OPTIONS);
        return;
    }
    word[0] = id->handle;
    word[1] =
        (u64)tcp->seq << 32 | (u64)tcp->source << 16 | tcp->dest; /* as they are on the wire */
    if (is_ipv4(s)) {
        word[2] = SINGLE(s->local_ip4) << 32 | SINGLE(s->remote_ip4);
    } else {
        word[2] = SINGLE(s->local_ip6[0]) << 32 | SINGLE(s->local_ip6[1]);
        word[3] = SINGLE(s->local_ip6[2]) << 32 | SINGLE(s->local_ip6[3]);
        word[4] = SINGLE(s->remote_ip6[0]) << 32 | SINGLE(s->remote_ip6[1]);
        word[5] = SINGLE(s->remote_ip6[2]) << 32 | SINGLE(s->remote_ip6[3]);
    }
    struct option o = {253, 20, bpf_htons(0x4e48), id->handle, 0};
    o.mac = siphash(set->key0, set->key1, word, 6);
    if (bpf_store_hdr_opt(s, &o, 20, 0) < 0) {
        o.length = 16; /* 4 bytes of the MAC: MPTCP and TFO cookies leave no more room */
        if (bpf_store_hdr_opt(s, &o, 16, 0) < 0)
            count_lost(LOST_OPTIONS);
    }
}

int on_sockops(struct bpf_sock_ops *s) {
    u32 zero = 0;
    u64 cookie;
    struct settings *set;
    switch (s->op) {
    case BPF_SOCK_OPS_TCP_CONNECT_CB:
        connecting(s);
        break;
    case BPF_SOCK_OPS_RTO_CB:
        set = settings.lookup(&zero);
        if (set && s->state == BPF_TCP_SYN_SENT && s->args[0] >= set->give_up)
            bpf_sock_ops_cb_flags_set(s, s->bpf_sock_ops_cb_flags & ~CALLBACKS);
        break;
    case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
        bpf_sock_ops_cb_flags_set(s, s->bpf_sock_ops_cb_flags & ~CALLBACKS);
        cookie = bpf_get_socket_cookie(s);
        sockets.delete(&cookie);
        break;
    case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
        if ((s->skb_tcp_flags & (SYN | ACK)) != SYN)
            break;
        if (bpf_reserve_hdr_opt(s, 20, 0) && bpf_reserve_hdr_opt(s, 16, 0))
            count_lost(LOST_OPTIONS);
        break;
    case BPF_SOCK_OPS_WRITE_HDR_OPT_CB:
        if ((s->skb_tcp_flags & (SYN | ACK)) == SYN)
            write_option(s);
        break;
    }
    return 1;
}
