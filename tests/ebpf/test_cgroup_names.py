"""What cgroup paths say: every form that was found in the wild."""

import pytest

from ebpf.cgroup_names import CgroupName, classify

ID = "0123456789abcdef" * 4
OUTER = "fedcba9876543210" * 4
UID = "74c13223-5a00-11e9-b385-42010a80018d"
LOW = UID.replace("-", "_")
STATIC = "0123456789abcdef0123456789abcdef"  # static pods have a hash for a UID


def container(runtime, pod="", identity=ID):
    return CgroupName("", identity, runtime, pod)


FORMS = {
    "": CgroupName(),
    "/": CgroupName(),
    "/system.slice": CgroupName(),
    "/system.slice/nginx.service": CgroupName("nginx.service"),
    "/system.slice/nginx.service/worker": CgroupName("nginx.service"),
    "/system.slice/system-getty.slice/getty@tty1.service": CgroupName("getty@tty1.service"),
    r"/system.slice/dev-disk-by\x2duuid-1.mount": CgroupName(r"dev-disk-by\x2duuid-1.mount"),
    "/init.scope": CgroupName("init.scope"),
    "/narrows/clients/backup-job": CgroupName(),
    "/user.slice/user-1000.slice/session-3.scope": CgroupName("session-3.scope"),
    "/user.slice/user-1000.slice/user@1000.service": CgroupName("user@1000.service"),
    "/user.slice/user-1000.slice/user@1000.service/app.slice/agent.service": CgroupName(
        "agent.service"
    ),
    "/user.slice/user-1000.slice/user@1000.service/init.scope": CgroupName("init.scope"),
    f"/system.slice/docker-{ID}.scope": container("docker"),
    f"/system.slice/docker-{ID}.scope/init": container("docker"),
    f"/docker/{ID}": container("docker"),
    f"/docker/{ID}/system.slice/cron.service": container("docker"),
    f"/system.slice/nerdctl-{ID}.scope": container("nerdctl"),
    f"/machine.slice/libpod-{ID}.scope/container": container("podman"),
    f"/machine.slice/libpod-{ID}.scope": container("podman"),
    f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope/container": (
        container("podman")
    ),
    f"/libpod_parent/libpod-{ID}": container("podman"),
    f"/machine.slice/libpod-conmon-{ID}.scope": CgroupName(f"libpod-conmon-{ID}.scope"),
    f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{LOW}.slice"
    f"/cri-containerd-{ID}.scope": container("containerd", UID),
    f"/kubepods.slice/kubepods-pod{LOW}.slice/crio-{ID}.scope": container("cri-o", UID),
    f"/kubepods.slice/kubepods-pod{LOW}.slice/crio-{ID}.scope/container": container("cri-o", UID),
    f"/kubepods.slice/kubepods-pod{LOW}.slice/crio-conmon-{ID}.scope": CgroupName(
        f"crio-conmon-{ID}.scope", "", "", UID
    ),
    f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{LOW}.slice"
    f"/docker-{ID}.scope": container("docker", UID),
    f"/kubepods/besteffort/pod{UID}/{ID}": container("", UID),
    f"/kubepods/burstable/pod{STATIC}/{ID}": container("", STATIC),
    f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{STATIC}.slice"
    f"/cri-containerd-{ID}.scope": container("containerd", STATIC),
    f"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice"
    f"/kubelet-kubepods-burstable-pod{LOW}.slice/cri-containerd-{ID}.scope": (
        container("containerd", UID)
    ),
    f"/docker/{OUTER}/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{LOW}.slice"
    f"/cri-containerd-{ID}.scope": container("containerd", UID),
    f"/system.slice/containerd.service/kubepods-burstable-pod{LOW}.slice:cri-containerd:{ID}": (
        container("containerd", UID)
    ),
    f"/ecs/{STATIC}/{STATIC}-1234567890": container("", "", f"{STATIC}-1234567890"),
    "/machine.slice/systemd-nspawn@web1.service/payload": container("nspawn", "", "web1"),
    r"/machine.slice/systemd-nspawn@web\x2d1.service/payload/system.slice/cron.service": (
        container("nspawn", "", "web-1")
    ),
    "/machine.slice/machine-web1.scope": container("nspawn", "", "web1"),
    r"/machine.slice/machine-qemu\x2d2\x2dbuild.scope/libvirt": container("libvirt", "", "build"),
    "/lxc.payload.web1/system.slice/x.service": container("lxc", "", "web1"),
    "/lxc.payload.web1": container("lxc", "", "web1"),
}


@pytest.mark.parametrize("path", FORMS)
def test_a_path_says_who_runs_in_it(path):
    assert classify(path) == FORMS[path]


@pytest.mark.parametrize(
    "path", [f"/x{ID}", f"/{ID[:-1]}", f"/system.slice/a{ID}b.service", f"/docker/{ID}x"]
)
def test_what_only_looks_like_a_container_is_none(path):
    assert classify(path).container == ""
