#!/usr/bin/env bash
# Makes what a virtual machine boots, once: Debian's cloud kernel, and a root directory with its NBD driver, file systems and
# tools. Prints the directory: vmlinuz and root/. Needs Debian 12 or 13, and root for what is to be installed.
. "$(dirname "$0")/../../../scripts/lib.sh"

packages=(qemu-system-x86 busybox-static kmod cpio e2fsprogs xfsprogs fio)
modules=(nbd ext4 xfs virtio_pci virtio_net)
tools=(mkfs.ext4 e2fsck mkfs.xfs xfs_repair fio)

need apt-get "this makes its machine of Debian's packages"
missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    [ "$(id -u)" = 0 ] || die "install these first: ${missing[*]}"
    say "installing packages: ${missing[*]}"
    apt-get update -q >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}" >&2
fi

kernel=$(apt-cache search --names-only '^linux-image-[0-9.+~a-z]+-[0-9a-z]+-cloud-amd64$' | cut -d' ' -f1 | sort -V | tail -1)
[ -n "$kernel" ] || die "apt-cache knows no cloud kernel: run 'apt-get update'"
made=$HYPERNBD_CACHE/$kernel-2
if [ -e "$made/done" ]; then
    printf '%s\n' "$made"
    exit 0
fi

work=$(mktemp -d "$HYPERNBD_CACHE/build-kernel.XXXXXX")
trap 'rm -rf "$work"' EXIT
say "downloading $kernel, udev"
(cd "$work" && quietly "$work/log" apt-get download -q "$kernel" udev)
dpkg-deb -x "$work/$kernel"_*.deb "$work/kernel"
# Debian 13 has modules below usr/.
modules_root=$work/kernel
[ -d "$modules_root/lib/modules" ] || modules_root=$work/kernel/usr
version=$(ls "$modules_root/lib/modules")
mkdir -p "$work/made/root"/{bin,sbin,dev,proc,sys,mnt,tmp,run,etc,"lib/modules/$version"}
root=$work/made/root
cp "$work/kernel/boot/vmlinuz-$version" "$work/made/vmlinuz"
depmod -b "$modules_root" "$version"
for module in "${modules[@]}"; do
    modprobe --show-depends -d "$modules_root" -S "$version" "$module" 2>/dev/null | awk '$1 == "insmod" { print $2 }'
done | sort -u | while read -r file; do
    cp "$file" "$root/lib/modules/$version/"
done
cp "$modules_root/lib/modules/$version"/modules.{builtin,order} "$root/lib/modules/$version/"
depmod -b "$root" "$version" 2>/dev/null

cp /bin/busybox "$root/bin/"
for applet in $(/bin/busybox --list); do
    [ -e "$root/bin/$applet" ] || ln -s busybox "$root/bin/$applet"
done
# Not the host's: it may have none.
dpkg-deb -x "$work"/udev_*.deb "$work/udev"
udevadm=$(find "$work/udev" -path '*/bin/udevadm' -type f)
"$(dirname "$0")/put.sh" "$root" "$udevadm" systemd-udevd
for tool in "${tools[@]}"; do
    "$(dirname "$0")/put.sh" "$root" "$(command -v "$tool")"
done
touch "$work/made/done"
rm -rf "$made"
mv "$work/made" "$made"
printf '%s\n' "$made"
