"""What must be there, from the lines that ack_writer processes have printed."""

from harness import Failure, run


class Expected:
    """What the writers have reported, as the states that each thing may be in."""

    def __init__(self, keep_last=None):
        self.keep_last = keep_last  # of the bucket's policy: older steps may go without anybody's doing
        self.objects = {}  # key -> versions it may have; 0 = absent
        self.steps = {}    # step -> "committed", "maybe", "maybe removed", "removed"
        self.launch_of = {}  # step that was visible at the last verify() -> the launch that saved it
        self.resumes = {}  # launch -> the step it resumed from
        self.acknowledged = 0

    def note(self, line, certain=True):
        """Takes a line of a writer. Not certain: it came after the cut, so that the operation may have been lost."""
        words = line.split()
        kind = words[1] if words[0] in ("start", "ack") else None
        acked = words[0] == "ack" and certain
        if acked:
            self.acknowledged += 1
        if kind in ("put", "rm"):
            key, version = words[2], int(words[3]) if kind == "put" else 0
            if acked:
                self.objects[key] = {version}
            else:
                self.objects.setdefault(key, {0}).add(version)
        elif kind == "step":
            step = int(words[2])
            if self.steps.get(step) in ("removed", "maybe removed"):
                pass  # a line of a slower rank: no step is saved again after it was removed
            elif acked:
                self.steps[step] = "committed"
            else:
                self.steps.setdefault(step, "maybe")
        elif kind == "rmstep":
            self.steps[int(words[2])] = "removed" if acked else "maybe removed"

    def may_be_gone(self, step):
        """By the policy, which counts what is committed, and what may be without our knowing."""
        counted = sorted(number for number, state in self.steps.items() if state in ("committed", "maybe"))
        return self.keep_last is not None and step not in counted[-self.keep_last:]

    def verify(self, program, daemon, bucket, run_name):
        """A fresh process reads everything; what it finds is what must be there from now on."""
        wanted = [f"object {bucket} {key} {' '.join(map(str, sorted(versions)))}"
                  for key, versions in sorted(self.objects.items())]
        wanted.append(f"run {run_name}")
        done = run([program, "verify", "--server", daemon.server], check=False, timeout=300,
                   input="\n".join(wanted) + "\n")
        problems = [line for line in done.stdout.splitlines() if line.startswith("bad ")]
        if done.returncode != 0 and not problems:
            problems.append(f"reader ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        visible = {}
        for line in done.stdout.splitlines():
            words = line.split()
            if words[0] == "object":
                self.objects[words[1]] = {int(words[2])}
            elif words[0] == "visible":
                visible[int(words[1])] = int(words[2])
        for step, state in sorted(self.steps.items()):
            if state == "committed" and step not in visible and not self.may_be_gone(step):
                problems.append(f"bad step {step}: acknowledged, and gone")
            if state == "removed" and step in visible:
                problems.append(f"bad step {step}: acknowledged as removed, and back")
        for step in sorted(visible.keys() - self.steps.keys()):
            problems.append(f"bad step {step}: visible, and nobody has saved it")
        for step, launch in visible.items():
            for newer, resume in self.resumes.items():
                if newer > launch and (resume is None or step > resume):
                    problems.append(f"bad step {step}: of launch {launch}, although launch {newer} opened the run at {resume}")
        self.launch_of = visible
        if problems:
            raise Failure("\n  ".join(["not as acknowledged:"] + problems[:20]))
        for step, state in list(self.steps.items()):
            if state == "maybe" and step in visible:
                self.steps[step] = "committed"
            elif state == "maybe removed" and step not in visible:
                self.steps[step] = "removed"
            # Not visible yet: an attempt that all ranks have sealed may still be committed, after a restart too.
