/*
 * What the programs and user space share: structs, counters and maps.
 *
 * ebpf/events.py mirrors the structs and holds the same sizes. Only stable UAPI types are used:
 * nothing here, or in the programs, reads a kernel struct, so that headers of another kernel
 * version do for compiling.
 *
 * A handle is the 64-bit name of "this exec of this program, in this cgroup, as this user":
 *   host 16 bit | start epoch of the sensor 12 bit | 0 | counter 35 bit
 *   host 16 bit | start epoch of the sensor 12 bit | 1 | generation 13 bit | process id 22 bit
 * (fallback form) The fallback form is for processes whose exec was not seen: generation 0 is the
 * scan of /proc at start, others are given here at connect. fork inherits the handle, exec gives a
 * new one, and so does a connect from another cgroup or as another user than the handle was
 * recorded with: an owner record is true for every socket under it.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/tcp.h>

struct settings {
    u64 key0, key1; /* SipHash key of the SYN option */
    u64 base;       /* host and epoch bits of every handle */
    u64 cgroup;     /* id of the sensor's cgroup subtree */
    u32 level;      /* its depth below the root */
    u32 filter;     /* 1: records only for processes below it; 0: user space filters */
    u32 give_up;    /* SYN retry from which on the option is left away */
    u32 unused;
};

struct process { /* by process id */
    u64 handle;
    u64 started;    /* CLOCK_MONOTONIC of the exec */
    u64 cgroup;     /* that the handle was recorded with; 0: it has no record */
    u32 uid;        /* likewise */
    u32 parent_pid; /* who forked it */
    s32 threads;    /* beside the leader */
    u32 flags;
};

struct ident { /* by socket cookie: who called connect() */
    u64 handle;
    u64 cgroup;
    u64 netns;
    u32 tgid, tid, uid, gid;
    char comm[16];
};

struct connect_event {
    u64 handle;
    u64 cgroup;
    u64 netns;
    u64 cookie;
    u64 ts;
    u32 tgid, tid, uid, gid;
    char comm[16];
    u32 source[4], target[4]; /* network order; IPv4 as ::ffff:a.b.c.d */
    u16 sport, dport;         /* host order */
    u32 version;              /* 4 or 6: what is on the wire */
};

struct record_head {
    u64 ts;
    u64 handle;
    u64 parent; /* handle before this one; at exec that of the program which forked it */
    u64 cgroup;
    u32 kind, tgid, ptgid, uid, gid;
    u32 argv_bytes;
    char comm[16];
};

struct record {
    struct record_head head;
    char path[256]; /* as given to execve: not resolved, a script's own path for scripts */
    char argv[512]; /* NUL-terminated arguments, argv_bytes in all */
};

struct arguments {
    u32 bytes;
    u32 unused;
    char text[640]; /* 512 are used; the rest lets the verifier see that the last read fits */
};

struct prefix {
    u32 length;
    u8 address[16];
};

_Static_assert(sizeof(struct settings) == 48, "settings");
_Static_assert(sizeof(struct process) == 40, "process");
_Static_assert(sizeof(struct ident) == 56, "ident");
_Static_assert(sizeof(struct connect_event) == 112, "connect_event");
_Static_assert(sizeof(struct record_head) == 72, "record_head");
_Static_assert(sizeof(struct record) == 840, "record");

enum kind {
    KIND_EXEC = 1,
    KIND_EXIT = 2,
    KIND_SEEN = 3,
    KIND_MOVED = 4,
    KIND_FOUND = 5,
};

enum lost {
    LOST_CONNECT_RING = 0,
    LOST_RECORD_RING = 1,
    LOST_PROCESSES = 2,
    LOST_RECORDS = 3,
    LOST_COOKIES = 4,
    LOST_OPTIONS = 5,
};

#define FLAG_LEADER_GONE 1

BPF_ARRAY(settings, struct settings, 1);
BPF_ARRAY(sequence, u64, 2); /* counter of executions, counter of fallback generations */
BPF_ARRAY(lost, u64, 8);
BPF_HASH(processes, u32, struct process, 65536);
BPF_TABLE("lru_hash", u64, struct record, records, 16384);
BPF_TABLE("lru_hash", u64, struct record_head, renamed, 16384);
BPF_RINGBUF_OUTPUT(record_ring, 1024);
BPF_RINGBUF_OUTPUT(connect_ring, 1024);

static __always_inline void count_lost(u32 which) {
    u64 *counter = lost.lookup(&which);
    if (counter)
        __sync_fetch_and_add(counter, 1);
}

static __always_inline u64 next_number(u32 which) {
    u64 *counter = sequence.lookup(&which);
    return counter ? __sync_fetch_and_add(counter, 1) : 0;
}

static __always_inline u64 counted_handle(struct settings *set) {
    return set->base | (next_number(0) & ((1ULL << 35) - 1));
}

static __always_inline u64 fallback_handle(struct settings *set, u32 tgid) {
    u64 generation = 1 + next_number(1) % 8191;
    return set->base | 1ULL << 35 | generation << 22 | (tgid & ((1 << 22) - 1));
}

/* Whether the current process is outside the sensor's subtree; "no" where the kernel cannot tell.
 */
static __always_inline int outside(struct settings *set) {
    return set->filter && bpf_get_current_ancestor_cgroup_id(set->level) != set->cgroup;
}
