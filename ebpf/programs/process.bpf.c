/*
 * Names every execution: tracepoints at exec, fork and exit give, inherit and end handles.
 *
 * Handles are kept for all processes, because a child may be moved into the sensor's cgroups after
 * the fork; records are written only for those below it. Tracepoints run with preemption off, so
 * one scratch record per CPU is enough.
 *
 * The arguments are read from the new program's stack before it runs its first instruction: what
 * its main() will get, whatever the caller's memory says by now.
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
};

struct newtask_args {
    u8 unused[0x4200];
    u32 pid;
    u8 unused2[0xfc];
    u64 clone_flags;
};

BPF_PERCPU_ARRAY(scratch, struct record, 1);

static __always_inline void note_arguments(struct settings *set, struct record *r) {
    void *mm = follow((void *)bpf_get_current_task(), set->at_task_mm);
    void *start = follow(mm, set->at_mm_arg_start);
    u64 bytes = (u64)follow(mm, set->at_mm_arg_end) - (u64)start;
    r->head.argv_bytes = 0;
    if (!start || bytes > 1 << 30)
        return;
    u32 copied = bytes < sizeof(r->argv) ? bytes : sizeof(r->argv);
    if (!bpf_probe_read_user(r->argv, copied, start))
        r->head.argv_bytes = bytes;
}

/* The program image was replaced: a new handle, and a record of what runs now. */
int on_exec(struct exec_args *args) {
    u32 zero = 0, tgid = bpf_get_current_pid_tgid() >> 32;
    u64 ids = bpf_get_current_uid_gid();
    struct settings *set = settings.lookup(&zero);
    struct record *r = scratch.lookup(&zero);
    if (!set || !r)
        return 0;
    int foreign = outside(set);
    struct process now = {}, *before = processes.lookup(&tgid);
    now.handle = counted_handle(set);
    now.started = bpf_ktime_get_ns();
    now.cgroup = foreign ? 0 : bpf_get_current_cgroup_id();
    now.uid = ids;
    r->head.parent = 0;
    if (before) {
        r->head.parent = before->handle;
        now.parent_pid = before->parent_pid;
    }
    if (processes.update(&tgid, &now))
        count_lost(LOST_PROCESSES);
    if (foreign)
        return 0;
    r->head.ts = now.started;
    r->head.handle = now.handle;
    r->head.cgroup = now.cgroup;
    r->head.kind = KIND_EXEC;
    r->head.tgid = tgid;
    r->head.ptgid = now.parent_pid;
    r->head.uid = ids;
    r->head.gid = ids >> 32;
    bpf_get_current_comm(r->head.comm, sizeof(r->head.comm));
    bpf_probe_read_kernel_str(r->path, sizeof(r->path), (void *)args + (args->filename & 0xffff));
    note_executable(set, &r->head);
    note_arguments(set, r);
    /* The map is the truth: it survives the process and a lost notification. */
    if (records.update(&now.handle, r))
        count_lost(LOST_RECORDS);
    if (record_ring.ringbuf_output(r, sizeof(*r), 0))
        count_lost(LOST_RECORD_RING);
    return 0;
}

/* Runs in the parent, before the child can run: a process inherits, a thread is nothing new. */
int on_newtask(struct newtask_args *args) {
    if (args->clone_flags & CLONE_THREAD)
        return 0;
    u32 parent = bpf_get_current_pid_tgid() >> 32, child = args->pid;
    struct process *p = processes.lookup(&parent);
    if (!p) {
        processes.delete(&child); /* a reused process id must not inherit from the dead */
        return 0;
    }
    struct process copy = *p;
    copy.parent_pid = parent;
    copy.flags = 0;
    if (processes.update(&child, &copy))
        count_lost(LOST_PROCESSES);
    return 0;
}

/* A thread ends; with the last one, which may be another than the first, the process does. */
int on_exit(void *args) {
    u32 zero = 0, tgid = bpf_get_current_pid_tgid() >> 32, live = 1;
    struct settings *set = settings.lookup(&zero);
    if (!set)
        return 0;
    void *signal = follow((void *)bpf_get_current_task(), set->at_task_signal);
    if (signal)
        bpf_probe_read_kernel(&live, sizeof(live), signal + set->at_signal_live);
    if (live == 0)
        processes.delete(&tgid);
    return 0;
}
