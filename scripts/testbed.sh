#!/bin/sh
# Install what the hosts of the test bed need and this machine lacks: nftables, sshd, rsync, ext4. Debian or Ubuntu, as root.
# Usage: scripts/testbed.sh        (does nothing where everything is there; no service is started or enabled)
set -eu

packages=
PATH=$PATH:/usr/sbin:/sbin
for pair in ip:iproute2 nft:nftables sshd:openssh-server ssh:openssh-client rsync:rsync mkfs.ext4:e2fsprogs losetup:mount; do
    command -v "${pair%%:*}" >/dev/null 2>&1 || packages="$packages ${pair#*:}"
done
[ -n "$packages" ] || exit 0

if [ "$(id -u)" != 0 ]; then
    echo "error: the test bed needs root, and these packages:$packages. Run: sudo scripts/testbed.sh" >&2
    exit 1
fi
if ! command -v apt-get >/dev/null 2>&1; then
    echo "error: install these packages, by the names that your distribution gives them:$packages" >&2
    exit 1
fi

# The test bed starts an sshd of its own in each host. Installing one must not open this machine to the network.
deny=/usr/sbin/policy-rc.d
if [ ! -e "$deny" ]; then
    trap 'rm -f "$deny"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$deny"
    chmod 755 "$deny"
fi

echo "Installing for the test bed:$packages"
export DEBIAN_FRONTEND=noninteractive
# Package lists may be old or missing; they are fetched only then.
# shellcheck disable=SC2086 - a list of words
apt-get install -qq -y --no-install-recommends $packages >/dev/null 2>&1 || {
    apt-get update -qq
    apt-get install -qq -y --no-install-recommends $packages >/dev/null
}
case "$packages" in
*openssh-server*) if [ -d /run/systemd/system ]; then systemctl disable --quiet ssh.service ssh.socket 2>/dev/null || true; fi ;;
esac
