"""An ext4 file system on a disk that fails and stalls when told: nbdkit with the filter of nbdkit_faults.cc, reached as a
file through nbdfuse, and as a disk through a loop device. The daemon under test is the real one."""

import contextlib
import os
import shutil
import signal
import socket
import time

from harness import Failure, Volume, run, skip, spawn


def require(filter_path):
    """Skips the test where such a disk is impossible; enters a private mount namespace."""
    if not filter_path or not os.path.exists(filter_path):
        skip("the filter for nbdkit was not built: it needs the headers of nbdkit (nbdkit-plugin-dev)")
    for program in ["nbdkit", "nbdfuse", "losetup", "mkfs.ext4"]:
        if shutil.which(program) is None and shutil.which(program, path="/usr/sbin:/sbin") is None:
            skip(f"no {program} here (deploy/setup.sh test installs it)")
    if not os.path.exists("/dev/fuse"):
        skip("no /dev/fuse here")
    Volume.require("ext4")


class FaultyDisk:
    def __init__(self, scratch, name, filter_path, size=2 << 30):
        self.folder = scratch / name
        self.faults = self.folder / "faults"
        self.mountpoint = self.folder / "mnt"
        self.data = self.mountpoint / "data"
        self.faults.mkdir(parents=True)
        self.mountpoint.mkdir()
        self._file = self.folder / "disk"
        self._file.touch()
        image, sock = self.folder / "image", self.folder / "socket"
        with open(image, "wb") as out:
            out.truncate(size)
        self._log = open(self.folder / "nbd.log", "wb")
        self._processes = [spawn(["nbdkit", "-f", "-U", sock, f"--filter={filter_path}", "file", image, f"faults={self.faults}"],
                                 stderr=self._log)]
        self._wait("nbdkit listens", lambda: self._answers(sock))
        self._processes.append(spawn(["nbdfuse", self._file, f"nbd+unix:///?socket={sock}"], stderr=self._log))
        self._wait("nbdfuse shows the disk", lambda: self._file.stat().st_size == size)
        run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", self._file])
        self.mount()

    @staticmethod
    def _answers(path):
        with socket.socket(socket.AF_UNIX) as peer:
            try:
                peer.connect(str(path))
                return True
            except OSError:
                return False

    def _wait(self, what, condition):
        until = time.monotonic() + 30
        while not condition():
            if time.monotonic() > until or any(p.poll() is not None for p in self._processes):
                raise Failure(f"{what}: not within 30 s: {(self.folder / 'nbd.log').read_text()}")
            time.sleep(0.01)

    def mount(self):
        # Direct: what the daemon writes past the page cache must not wait in another one.
        device = run(["losetup", "--direct-io=on", "--find", "--show", self._file]).stdout.strip()
        try:
            run(["mount", device, self.mountpoint])
        finally:
            run(["losetup", "-d", device])  # now, or as soon as it is unmounted

    def unmount(self):
        until = time.monotonic() + 60
        while run(["umount", self.mountpoint], check=False).returncode != 0:
            if time.monotonic() > until:
                raise Failure(f"cannot unmount {self.mountpoint}")
            time.sleep(0.02)

    def set(self, fault):
        (self.faults / f"hit-{fault}").unlink(missing_ok=True)
        (self.faults / fault).touch()

    def clear(self, fault):
        (self.faults / fault).unlink(missing_ok=True)

    def hit(self, fault):
        return (self.faults / f"hit-{fault}").exists()

    @contextlib.contextmanager
    def fault(self, name):
        """The fault is there inside, and must have hit something."""
        self.set(name)
        try:
            yield
        finally:
            self.clear(name)
        if not self.hit(name):
            raise Failure(f"{name} of {self.folder.name} has hit nothing")

    def heal(self):
        """As after a reboot: nothing fails any more, and the file system is repaired by its journal."""
        for fault in ["fail-read", "fail-write", "fail-flush", "stall"]:
            self.clear(fault)
        self.unmount()
        self.mount()

    def close(self):
        for fault in ["fail-read", "fail-write", "fail-flush", "stall"]:
            self.clear(fault)
        run(["umount", "-l", self.mountpoint], check=False)
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
        self._log.close()
