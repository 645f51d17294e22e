/*
 * What the programs and user space share: structs, counters and maps.
 *
 * ebpf/events.py mirrors the structs and holds the same sizes. For compiling, only stable UAPI
 * types are used, so that headers of another kernel version do. Of the running kernel's own structs
 * a few pointers are followed, at offsets that the loader takes from that kernel's BTF (struct
 * settings, `at_...`) and never at offsets that are compiled in.
 *
 * A handle is the 64-bit name of "this exec of this program, in this cgroup, as this user":
 *   host 16 bit | start epoch of the sensor 12 bit | 0 | counter 35 bit
 *   host 16 bit | start epoch of the sensor 12 bit | 1 | generation 13 bit | process id 22 bit
 * The second, fallback form is for processes whose exec was not seen: generation 0 is the scan of
 * /proc at start, others are given here at connect. fork inherits the handle, exec gives a new one,
 * and so does a connect from another cgroup or as another user than the handle was recorded with:
 * an owner record is true for every socket under it.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/tcp.h>

struct settings {
    u64 key0, key1; /* SipHash key of the SYN option */
    u64 base;       /* host and epoch bits of every handle */
    u64 cgroup;     /* id of the sensor's cgroup subtree */
    u32 level;      /* its depth below the root */
    u32 give_up;    /* SYN retry from which on the option is left away */
    /* Offsets of this kernel: */
    u32 at_task_mm, at_task_signal, at_signal_live;
    u32 at_mm_exe, at_mm_arg_start, at_mm_arg_end;
    u32 at_file_inode, at_inode_number, at_inode_super, at_super_device;
};

struct process { /* by process id */
    u64 handle;
    u64 started;    /* CLOCK_MONOTONIC of the exec */
    u64 cgroup;     /* that the handle was recorded with; 0: it has no record */
    u32 uid;        /* likewise */
    u32 parent_pid; /* who forked it */
    u32 flags;
    u32 unused;
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
    u64 inode;  /* of the executable; 0 where there is none */
    u32 device; /* of its file system: major << 20 | minor */
    u32 kind, tgid, ptgid, uid, gid;
    u32 argv_bytes; /* of all arguments; of these, the first 512 are in the record */
    u32 unused;
    char comm[16];
};

struct record {
    struct record_head head;
    char path[256]; /* as given to execve: not resolved, a script's own path for scripts */
    char argv[512]; /* NUL-terminated arguments, as the new program finds them */
};

struct prefix {
    u32 length;
    u8 address[16];
};

_Static_assert(sizeof(struct settings) == 80, "settings");
_Static_assert(sizeof(struct process) == 40, "process");
_Static_assert(sizeof(struct ident) == 56, "ident");
_Static_assert(sizeof(struct connect_event) == 112, "connect_event");
_Static_assert(sizeof(struct record_head) == 88, "record_head");
_Static_assert(sizeof(struct record) == 856, "record");

enum kind {
    KIND_EXEC = 1,
    KIND_SEEN = 2,
    KIND_MOVED = 3,
};

enum lost {
    LOST_CONNECT_RING = 0,
    LOST_RECORD_RING = 1,
    LOST_PROCESSES = 2,
    LOST_RECORDS = 3,
    LOST_COOKIES = 4,
    LOST_OPTIONS = 5,
};

#define FLAG_SKIPPED 1 /* its sockets are never noted: a gate */

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

/* Whether the current process is outside the sensor's subtree. */
static __always_inline int outside(struct settings *set) {
    return bpf_get_current_ancestor_cgroup_id(set->level) != set->cgroup;
}

/* Follows a pointer of a kernel struct; null leads to null. */
static __always_inline void *follow(void *from, u32 offset) {
    void *to = 0;
    if (from)
        bpf_probe_read_kernel(&to, sizeof(to), from + offset);
    return to;
}

/* Which file the current process runs: the inode number means nothing without the device. */
static __always_inline void note_executable(struct settings *set, struct record_head *head) {
    void *mm = follow((void *)bpf_get_current_task(), set->at_task_mm);
    void *inode = follow(follow(mm, set->at_mm_exe), set->at_file_inode);
    void *super = follow(inode, set->at_inode_super);
    head->inode = (u64)follow(inode, set->at_inode_number);
    head->device = 0;
    if (super)
        bpf_probe_read_kernel(&head->device, sizeof(head->device), super + set->at_super_device);
}
