//! What file system a path is on, by the kernel's list of mounts. Pure.

/// Of a file system, as `/proc/self/mountinfo` tells it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Mount {
    /// Its type: `ext4`, `nfs4`, `fuse.sshfs`.
    pub kind: String,
    /// The options of the file system itself.
    options: String,
}

impl Mount {
    /// Of the path, which must be one without links; `list` is the text of `/proc/self/mountinfo`. `None` when it is not
    /// told there.
    pub fn of(path: &str, list: &str) -> Option<Self> {
        let mounts = list.lines().filter_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            let place = unescape(before.split(' ').nth(4)?);
            let rest = path.strip_prefix(&place)?;
            let is_above = place.ends_with('/') || rest.is_empty() || rest.starts_with('/');
            let mut after = after.split(' ');
            let kind = after.next()?.to_owned();
            let options = after.nth(1).unwrap_or_default().to_owned();
            is_above.then_some((place.len(), Self { kind, options }))
        });
        // Of several at one place the last one covers the others, and it is the last of the largest that is kept.
        mounts.max_by_key(|(len, _)| *len).map(|(_, mount)| mount)
    }

    /// The option by which locks keep out only the processes of this machine, where others may have the directory too.
    pub fn local_locks(&self) -> Option<&str> {
        let telling: &[&str] = match self.kind.as_str() {
            "nfs" | "nfs4" => &["nolock", "local_lock=flock", "local_lock=all"],
            "cifs" | "smb3" => &["nobrl"],
            "gfs2" | "ocfs2" => &["localflocks"],
            _ => &[],
        };
        self.options.split(',').find(|option| telling.contains(option))
    }
}

/// Blanks and the like stand there in octal.
fn unescape(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(field.to_owned(), |text, (from, to)| text.replace(from, to))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
30 22 0:40 / /mnt rw - tmpfs tmpfs rw
31 30 0:41 / /mnt/a\\040b rw,nosuid shared:3 master:1 - nfs4 server:/x rw,vers=4.2,local_lock=none
32 30 0:42 / /mnt/old rw - nfs server:/y rw,vers=3,nolock,local_lock=all
33 30 0:43 / /mnt/old rw - fuse.sshfs me@server: rw,user_id=0
34 22 0:44 / /share rw - cifs //server/share rw,nobrl
";

    #[test]
    fn a_path_is_on_the_innermost_and_newest_mount() {
        for (path, kind) in [
            ("/", "ext4"),
            ("/mnt", "tmpfs"),
            ("/mntx", "ext4"),
            ("/mnt/a b", "nfs4"),
            ("/mnt/a b/c", "nfs4"),
            ("/mnt/a", "tmpfs"),
            ("/mnt/old/volume", "fuse.sshfs"),
        ] {
            assert_eq!(Mount::of(path, LIST).unwrap().kind, kind, "{path}");
        }
        assert_eq!(Mount::of("/x", "garbage\n1 2 3 - \n"), None);
    }

    #[test]
    fn mounts_whose_locks_stay_on_this_machine_are_told_by_their_options() {
        assert_eq!(Mount::of("/mnt/a b", LIST).unwrap().local_locks(), None);
        assert_eq!(Mount::of("/share", LIST).unwrap().local_locks(), Some("nobrl"));
        let old = LIST.lines().nth(3).unwrap();
        assert_eq!(Mount::of("/mnt/old", old).unwrap().local_locks(), Some("nolock"));
        assert_eq!(Mount::of("/", LIST).unwrap().local_locks(), None);
    }
}
