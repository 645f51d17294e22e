/*
 * Names every execution: tracepoints at exec, fork and exit give, inherit and end handles.
 *
 * Handles are kept for all processes, because a child may be moved into the sensor's cgroups after
 * the fork; records are written only for those below it. Tracepoints run with preemption off, so
 * one scratch record per CPU is enough.
 *
 * Where it may be wrong: argv is read from the caller's memory before the exec, and may be changed
 * by another thread while the kernel copies it; a page that is not present reads as empty.
 */
#include "sensor.h"

#define CLONE_THREAD 0x00010000

/*
 * Tracepoint fields move between kernels. The offsets below are placeholders that no other load in
 * these programs can have: build.py notes where they stand, loader.py writes this kernel's offsets
 * in (from tracefs `format`).
 */
struct exec_args {
    u8 unused[0x4000];
    u32 filename; /* __data_loc: offset in the low 16 bits */
    u8 unused2[0xfc];
    u32 old_pid;
};

struct newtask_args {
    u8 unused[0x4200];
    u32 pid;
    u8 unused2[0xfc];
    u64 clone_flags;
};

struct execve_args {
    u8 unused[0x4400];
    u64 argv;
};

BPF_PERCPU_ARRAY(scratch, struct record, 1);
BPF_PERCPU_ARRAY(argv_scratch, struct arguments, 1);
BPF_TABLE("lru_hash", u32, struct arguments, pending_argv,
          1024); /* by thread, from execve to exec */

static __always_inline void fill_head(struct record_head *head, struct process *p, u64 parent) {
    u64 ids = bpf_get_current_uid_gid();
    head->ts = p->started;
    head->handle = p->handle;
    head->parent = parent;
    head->cgroup = bpf_get_current_cgroup_id();
    head->kind = KIND_EXEC;
    head->tgid = bpf_get_current_pid_tgid() >> 32;
    head->ptgid = p->parent_pid;
    head->uid = ids;
    head->gid = ids >> 32;
    head->argv_bytes = 0;
    bpf_get_current_comm(head->comm, sizeof(head->comm));
}

/* The program image was replaced: a new handle, and a record of what runs now. */
int on_exec(struct exec_args *args) {
    u32 zero = 0, tgid = bpf_get_current_pid_tgid() >> 32, caller = args->old_pid;
    struct settings *set = settings.lookup(&zero);
    struct record *r = scratch.lookup(&zero);
    if (!set || !r)
        return 0;
    int foreign = outside(set);
    struct process now = {}, *before = processes.lookup(&tgid);
    u64 parent = 0;
    now.handle = counted_handle(set);
    now.started = bpf_ktime_get_ns();
    now.cgroup = foreign ? 0 : bpf_get_current_cgroup_id();
    now.uid = bpf_get_current_uid_gid();
    if (before) {
        parent = before->handle;
        now.parent_pid = before->parent_pid;
    }
    if (processes.update(&tgid, &now))
        count_lost(LOST_PROCESSES);
    if (foreign)
        return 0;
    fill_head(&r->head, &now, parent);
    bpf_probe_read_kernel_str(r->path, sizeof(r->path), (void *)args + (args->filename & 0xffff));
    struct arguments *given = pending_argv.lookup(&caller);
    if (given) {
        r->head.argv_bytes = given->bytes;
        bpf_probe_read_kernel(r->argv, sizeof(r->argv), given->text);
        pending_argv.delete(&caller);
    }
    /* The map is the truth: it survives the process and a lost notification. */
    if (records.update(&now.handle, r))
        count_lost(LOST_RECORDS);
    if (record_ring.ringbuf_output(r, sizeof(*r), 0))
        count_lost(LOST_RECORD_RING);
    return 0;
}

/* Runs in the parent, before the child can run: a process inherits, a thread is counted. */
int on_newtask(struct newtask_args *args) {
    u32 parent = bpf_get_current_pid_tgid() >> 32, child = args->pid;
    struct process *p = processes.lookup(&parent);
    if (args->clone_flags & CLONE_THREAD) {
        if (p)
            __sync_fetch_and_add(&p->threads, 1);
        return 0;
    }
    if (!p) {
        processes.delete(&child); /* a reused process id must not inherit from the dead */
        return 0;
    }
    struct process copy = *p;
    copy.parent_pid = parent;
    copy.threads = 0;
    copy.flags = 0;
    if (processes.update(&child, &copy))
        count_lost(LOST_PROCESSES);
    return 0;
}

/*
 * A thread ends. The leader may end before the others, so the entry stays until nobody is left.
 * Where the count drifts (threads older than the sensor), an entry stays until its process id is
 * used again, or goes early and the next connect gives a fallback handle: never a wrong one.
 */
int on_exit(void *args) {
    u64 id = bpf_get_current_pid_tgid();
    u32 tgid = id >> 32, tid = id;
    struct process *p = processes.lookup(&tgid);
    if (!p)
        return 0;
    if (tid == tgid)
        p->flags |= FLAG_LEADER_GONE;
    else
        __sync_fetch_and_add(&p->threads, -1);
    if (!(p->flags & FLAG_LEADER_GONE) || p->threads > 0)
        return 0;
    if (p->cgroup) {
        struct record_head head = {};
        fill_head(&head, p, 0);
        head.ts = bpf_ktime_get_ns();
        head.kind = KIND_EXIT;
        if (record_ring.ringbuf_output(&head, sizeof(head), 0))
            count_lost(LOST_RECORD_RING);
    }
    processes.delete(&tgid);
    return 0;
}

static __always_inline int note_argv(const char *const *argv) {
    u32 zero = 0, tid = bpf_get_current_pid_tgid(), used = 0;
    struct settings *set = settings.lookup(&zero);
    struct arguments *a = argv_scratch.lookup(&zero);
    if (!set || !a || outside(set))
        return 0;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const char *argument = 0;
        bpf_probe_read_user(&argument, sizeof(argument), &argv[i]);
        if (!argument || used >= 512 - 1)
            break;
        int length = bpf_probe_read_user_str(&a->text[used & 511], 128, argument);
        if (length <= 0)
            break;
        used += length;
    }
    if (used > 512) {
        used = 512;
        a->text[511] = 0;
    }
    a->bytes = used;
    pending_argv.update(&tid, a);
    return 0;
}

int on_execve(struct execve_args *args) {
    return note_argv((const char *const *)args->argv);
}

int on_execveat(struct execve_args *args) {
    return note_argv((const char *const *)args->argv);
}
