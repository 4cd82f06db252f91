#!/usr/bin/env bash
# Boot a throw-away systemd and run a command in it: no virtual machine, no download, and nothing outside can be changed.
#
#   sudo tests/systemd/sandbox.sh COMMAND...      COMMAND runs as root, as a unit of that systemd
#
# The root is an overlay over this machine's files whose changes go to memory, entered by pivot_root; the old root is then
# detached. That matters: a systemd that boots on the real root cleans up /tmp, among other things. So the first
# thing that happens inside is a check that what is deleted there stays outside, and nothing boots if it does not.
# Namespaces: pid, mount, ipc, uts, net, cgroup. Needs root, cgroup2, overlayfs and Debian's systemd.
set -euo pipefail

if [ "${1:-}" != --inside ]; then
    [ "$(id -u)" = 0 ] || { echo 'sandbox.sh: needs root' >&2; exit 2; }
    [ $# -gt 0 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
    work=$(mktemp -d /run/xditd-sandbox.XXXXXX)
    unified=$(findmnt -n -t cgroup2 -o TARGET | head -1)
    [ -n "$unified" ] || { echo 'sandbox.sh: no cgroup2 is mounted' >&2; exit 2; }
    # A cgroup of its own: that systemd sees, and could kill, only what is in it.
    cgroup="$unified/xditd-sandbox-$$"
    mkdir "$cgroup"
    touch "$work/witness"
    cleanup() {
        find "$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null || true
        rm -f "$work/witness" "$work/status" && rmdir "$work/root" "$work" 2>/dev/null || true
    }
    trap cleanup EXIT
    mkdir "$work/root"
    status=0
    (
        echo "$BASHPID" > "$cgroup/cgroup.procs"
        exec unshare --pid --fork --kill-child --mount --ipc --uts --net --cgroup \
            "$(realpath "$0")" --inside "$work" "$(realpath "$(dirname "$0")/../..")" "$@"
    ) || status=$?
    [ -e "$work/witness" ] || { echo 'sandbox.sh: the witness file is gone: the sandbox leaks' >&2; exit 1; }
    exit "$status"
fi

work=$2 repository=$3
shift 3
mount --make-rprivate /
# What /proc/1 is here is bash, which becomes systemd by exec.
mount -t tmpfs -o mode=755 tmpfs "$work/root"
mkdir "$work/root/upper" "$work/root/work" "$work/root/new"
mount -t overlay -o "lowerdir=/,upperdir=$work/root/upper,workdir=$work/root/work" overlay "$work/root/new"
cd "$work/root/new"
mount -t proc -o nosuid,nodev,noexec proc proc
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs sys
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755,nosuid tmpfs dev
mkdir dev/shm dev/pts
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mkfifo dev/sandbox-out
ln -s /proc/self/fd dev/fd
while read -r name major minor; do
    mknod -m 666 "dev/$name" c "$major" "$minor"
done <<<'null 1 3
zero 1 5
full 1 7
random 1 8
urandom 1 9
tty 5 0'
mkdir -p old
pivot_root . old
cd /
umount -l /old
# The witness file lies under /run: this removes the overlay's view of it. The caller looks whether the real one is still there.
[ -e "$work/witness" ] && rm "$work/witness"
if grep -qvE ' - (overlay|proc|sysfs|cgroup2|tmpfs|devpts) ' /proc/self/mountinfo; then
    echo 'sandbox.sh: a mount of the machine is left inside:' >&2
    grep -vE ' - (overlay|proc|sysfs|cgroup2|tmpfs|devpts) ' /proc/self/mountinfo >&2
    exit 1
fi
if [ "$1" = true ]; then
    cut -d' ' -f5- /proc/self/mountinfo   # only the checks above
    exit 0
fi

mount -t tmpfs -o mode=755,nosuid,nodev tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /var/log
mount -o bind,ro /proc/sys /proc/sys
chmod 755 /root 2>/dev/null || true   # the overlay's: a Python below it has to be found by the service's user
rm -f /etc/machine-id
printf '%032x\n' 1 > /etc/machine-id
mkdir -p /run/systemd/system
cat > /run/systemd/system/sandbox.target <<UNIT
[Unit]
DefaultDependencies=no
Wants=sandbox.service systemd-journald.service
UNIT
cat > /run/systemd/system/sandbox.service <<UNIT
[Unit]
DefaultDependencies=no
After=systemd-journald.service
SuccessAction=exit
FailureAction=exit
[Service]
Type=oneshot
WorkingDirectory=$repository
Environment=PATH=$PATH PYTHONPATH=${PYTHONPATH:-} PYTHONDONTWRITEBYTECODE=1
ExecStart=$*
ExecStopPost=/bin/sleep 0.5
StandardOutput=append:/dev/sandbox-out
StandardError=append:/dev/sandbox-out
UNIT
for unit in systemd-tmpfiles-setup.service systemd-tmpfiles-setup-dev.service systemd-tmpfiles-clean.timer \
    systemd-udevd.service systemd-udev-trigger.service systemd-sysctl.service systemd-modules-load.service; do
    ln -sf /dev/null "/run/systemd/system/$unit"
done
# Not even root may make device nodes, set the clock or load a module in there.
# systemd closes what it inherits, so what the command prints comes out through this process.
cat <>/dev/sandbox-out &
exec setpriv --bounding-set -mknod,-sys_module,-sys_rawio,-sys_time,-sys_boot \
    env -i container=sandbox PATH="$PATH" \
    /lib/systemd/systemd --system --unit=sandbox.target --log-target=journal --show-status=0 >/dev/null 2>&1
