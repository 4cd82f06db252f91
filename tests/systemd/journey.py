"""The system unit in a real systemd, from installation to removal; prints a log in Markdown.

    sudo tests/systemd/sandbox.sh python tests/systemd/journey.py      in a throw-away systemd
    sudo python tests/systemd/journey.py                              in a virtual machine made for it

It makes a user (``xditd-journey``), installs the units for that user, and removes both at its end. Workers are the real
group, two gloo ranks on the CPU, and the client lends a small random checkpoint; with ``--fake`` they are the fake one
of the integration tests, which starts at once. Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
USER = "xditd-journey"
UNIT, SOCKET = f"xditd@{USER}.service", f"xditd@{USER}.socket"
RUNTIME = Path("/run/xditd") / USER
PREFIX = Path("/opt/xditd-journey")
CHECKPOINT = Path("/home") / USER / "flux1.safetensors"
IS_REAL = "--fake" not in sys.argv[1:]
DEADLINE_S = 180.0
DRAIN_S = 3
MOST_EXPOSED = 2.5


def run(*words: str, check: bool = True) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(words)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return (done.stdout + done.stderr).strip()


def title(text: str) -> None:
    print(f"\n## {text}\n", flush=True)


def show(text: str) -> None:
    print("```\n" + text.strip() + "\n```", flush=True)


def prop(name: str) -> str:
    return run("systemctl", "show", UNIT, "-p", name, "--value")


def wait_for(what: str, condition: Callable[[], bool]) -> float:
    """Seconds until it was so."""
    began_s = time.monotonic()
    while not condition():
        if time.monotonic() - began_s > DEADLINE_S:
            raise SystemExit(f"{what}: not so within {DEADLINE_S:.0f} s\n{journal()}")
        time.sleep(0.02)
    return time.monotonic() - began_s


def journal(lines: int = 40) -> str:
    text = run("journalctl", "-u", UNIT, "-o", "short-monotonic", "--no-hostname", "--no-pager", "-n", str(lines))
    return re.sub(r"\[\d+\]", "", text).replace(str(ROOT), "/srv/xditd")


def group() -> list[int]:
    """Processes of the unit."""
    path = Path("/sys/fs/cgroup") / prop("ControlGroup").strip("/") / "cgroup.procs"
    return [int(line) for line in path.read_text().split()] if prop("ControlGroup") and path.exists() else []


def ready() -> bool:
    return prop("StatusText").endswith("workers ready")


def as_user(*words: str) -> list[str]:
    return ["runuser", "-u", USER, "--", "env", f"XDITD_RUNTIME_DIR={RUNTIME}", *words]


def install() -> None:
    """An environment with an xditd command, a user, a configuration, and the units."""
    run(sys.executable, "-m", "venv", "--without-pip", str(PREFIX))
    python = PREFIX / "bin" / "python"
    (site,) = PREFIX.glob("lib/python*/site-packages")
    (site / "journey.pth").write_text(f"{ROOT / '.pkg'}\n{sysconfig.get_path('purelib')}\n")
    command = PREFIX / "bin" / "xditd"
    command.write_text(f"#!{python}\nimport sys\nfrom xditd.__main__ import main\nsys.exit(main())\n")
    command.chmod(0o755)
    run("useradd", "--create-home", USER)
    folder = Path(pwd.getpwnam(USER).pw_dir) / ".config" / "xditd"
    folder.mkdir(parents=True)
    fake = [str(python), str(ROOT / "tests/integration/fake_workers.py"), "--step-s", "0.05"]
    workers = 'count = 2\ndevice = "cpu"' if IS_REAL else f"command = {json.dumps(fake)}"
    daemon = f"metrics = 'unix'\ndrain_deadline_s = {DRAIN_S}"
    (folder / "xditd.toml").write_text(f"[daemon]\n{daemon}\n[workers]\n{workers}\n")
    run("chown", "-R", f"{USER}:", str(folder.parent))
    if IS_REAL:
        make = "import sys, pathlib; from xditd.client.demo.checkpoints import write_flux1; "
        make += "write_flux1(pathlib.Path(sys.argv[1]), seed=1)"
        run(*as_user(str(python), "-c", make, str(CHECKPOINT)))
    show(run(str(command), "install-service", "--system", "--for", USER))
    drop_in = Path(f"/run/systemd/system/{UNIT}.d/short.conf")
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("[Service]\nWatchdogSec=4\n")
    print(
        f"\nWatchdogSec is 4 instead of 30 in this run, and drain_deadline_s {DRAIN_S} instead of 20, so that it does "
        "not take so long.",
        flush=True,
    )
    run("systemd-sysusers", "xditd.conf")
    run("systemd-tmpfiles", "--create", "xditd.conf")  # by name: without one it would clean the whole machine
    run("systemctl", "daemon-reload")
    show(run(str(command), "install-service", "--system", "--for", USER, "--check"))


def analyze() -> None:
    """What systemd itself says of the unit as it is loaded here, drop-in and all."""
    found = run("systemd-analyze", "verify", "--man=no", UNIT, SOCKET)
    print(f"`systemd-analyze verify`: {found or 'nothing to say'}", flush=True)
    level = run("systemd-analyze", "security", "--no-pager", UNIT).splitlines()[-1]
    print(f"`systemd-analyze security`: {level}", flush=True)
    exposure = re.search(r": ([0-9.]+)", level)
    if found or exposure is None or float(exposure[1]) > MOST_EXPOSED:
        raise SystemExit("the unit has faults, or is too open")


def start() -> None:
    run("systemctl", "start", SOCKET)
    began_s = time.monotonic()
    run("systemctl", "start", UNIT)
    ready_s = time.monotonic() - began_s
    workers_s = wait_for("workers ready", ready)
    print(
        f"`systemctl start` returned after {ready_s:.2f} s (READY=1), the workers were ready {workers_s:.2f} s later."
    )
    status = Path(f"/proc/{prop('MainPID')}/status").read_text()
    wanted = ("Uid", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp:")
    facts = "\n".join(line for line in status.splitlines() if line.startswith(wanted))
    show(f"{facts}\nStatusText: {prop('StatusText')}\n{run('ls', '-la', str(RUNTIME))}")
    if prop("ActiveState") != "active" or "NoNewPrivs:\t1" not in status:
        raise SystemExit(f"not active, or not closed off:\n{status}")


def another_user() -> None:
    out = run(
        "runuser",
        "-u",
        "daemon",
        "--",
        "env",
        f"XDITD_RUNTIME_DIR={RUNTIME}",
        str(PREFIX / "bin/xditd"),
        "status",
        check=False,
    )
    show(out)
    if "not_permitted" not in out:
        raise SystemExit("another user was let in")


def attach() -> subprocess.Popen[str]:
    """A client with a loan and a running job."""
    word = as_user(str(PREFIX / "bin/python"), str(ROOT / "tests/systemd/attached_client.py"), str(RUNTIME))
    word += [str(CHECKPOINT)] if IS_REAL else []
    client = subprocess.Popen(word, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert client.stdout is not None
    seen = []
    while not seen or "its job runs" not in seen[-1]:
        line = client.stdout.readline()
        if not line:
            raise SystemExit("the client ended:\n" + "".join(seen))
        seen.append(line)
    client.seen = seen  # type: ignore[attr-defined]
    return client


def detach(client: subprocess.Popen[str], words: str) -> None:
    out, _ = client.communicate(timeout=DEADLINE_S)
    text = "".join(client.seen) + out  # type: ignore[attr-defined]
    show(text)
    pids = re.findall(r"daemon (\d+)$", text, flags=re.MULTILINE)
    if words not in text or "served again" not in text or len(set(pids)) != 2:
        raise SystemExit("the client was not served again, or not told why")


def watchdog() -> None:
    before, pid, pids = int(prop("NRestarts")), int(prop("MainPID")), group()
    os.kill(pid, signal.SIGSTOP)
    took_s = wait_for("restart by the watchdog", lambda: int(prop("NRestarts")) > before)
    back_s = wait_for("workers ready", ready)
    left = [each for each in pids if Path(f"/proc/{each}").exists()]
    print(f"SIGSTOP to the daemon: restarted after {took_s:.2f} s, workers ready {back_s:.2f} s later; of its "
          f"{len(pids)} processes {len(left)} are left.")  # fmt: skip
    show(
        "\n".join(
            line for line in journal(60).splitlines() if re.search(r"[Ww]atchdog|Scheduled restart|SIGABRT", line)
        )
    )
    if left or int(prop("MainPID")) == pid:
        raise SystemExit(f"left: {left}")


def reload() -> None:
    path = Path(pwd.getpwnam(USER).pw_dir) / ".config" / "xditd" / "xditd.toml"
    path.write_text(path.read_text().replace("[daemon]", "[daemon]\nqueue_limit = 7"))
    run("systemctl", "reload", UNIT)
    wait_for("the reload", lambda: "configuration reloaded" in prop("StatusText"))
    show(prop("StatusText"))


def restart_with_client() -> None:
    client = attach()
    began_s = time.monotonic()
    run("systemctl", "restart", UNIT)
    print(f"`systemctl restart` took {time.monotonic() - began_s:.2f} s, of which the job had {DRAIN_S} to finish.")
    detach(client, "daemon_stopping")


def stop_under_load() -> None:
    """The socket stays, so the client's next question starts the next daemon."""
    wait_for("workers ready", ready)
    client = attach()
    pids = group()
    began_s = time.monotonic()
    run("systemctl", "stop", UNIT)
    took_s = time.monotonic() - began_s
    left = [each for each in pids if Path(f"/proc/{each}").exists()]
    print(f"`systemctl stop` took {took_s:.2f} s; of {len(pids)} processes {len(left)} are left.")
    detach(client, "daemon_stopping")
    if left or took_s > 20:
        raise SystemExit(f"left: {left}")


def misconfigured() -> None:
    run("systemctl", "stop", SOCKET, UNIT)
    path = Path(pwd.getpwnam(USER).pw_dir) / ".config" / "xditd" / "xditd.toml"
    sound = path.read_text()
    path.write_text("[daemon]\nqueue_limit = 'many'\n")
    out = run("systemctl", "start", UNIT, check=False)
    show(out.splitlines()[0] if out else "")
    facts = {name: prop(name) for name in ("ActiveState", "Result", "ExecMainStatus", "NRestarts")}
    show("\n".join(f"{name}: {value}" for name, value in facts.items()))
    path.write_text(sound)
    if facts["ExecMainStatus"] != "2" or facts["ActiveState"] != "failed":
        raise SystemExit("a wrong configuration should fail at once, and not be tried again")


def uninstall() -> None:
    show(run(str(PREFIX / "bin" / "xditd"), "install-service", "--system", "--for", USER, "--uninstall"))
    run("systemctl", "daemon-reload")
    run("userdel", "--remove", USER, check=False)
    shutil.rmtree(PREFIX)
    shutil.rmtree(f"/run/systemd/system/{UNIT}.d")


STEPS: tuple[tuple[str, Callable[[], None]], ...] = (
    ("Install", install),
    ("What systemd says of the unit", analyze),
    ("Start to READY", start),
    ("Another user", another_user),
    ("Watchdog: kill and restart", watchdog),
    ("Reload", reload),
    ("Restart with a client attached", restart_with_client),
    ("Stop under load", stop_under_load),
    ("Journal", lambda: show(journal(60))),
    ("A wrong configuration", misconfigured),
    ("Uninstall", uninstall),
)


def main() -> int:
    if os.getuid() != 0 or Path("/proc/1/comm").read_text().strip() != "systemd":
        print("journey: needs root, and systemd as process 1", file=sys.stderr)
        return 2
    print(f"systemd: {run('systemctl', '--version').splitlines()[0]}")
    print("workers: two gloo ranks on the CPU" if IS_REAL else "workers: the fake group of the integration tests")
    for name, step in STEPS:
        title(name)
        step()
    print("\nEvery step did what it should.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
