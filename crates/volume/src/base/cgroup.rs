//! What the control groups of this process allow it: systemd's `MemoryMax=` and `TasksMax=`, a container's limits.
//!
//! `/proc/self/cgroup` names the group of each controller, below `/sys/fs/cgroup` (version 2) or `/sys/fs/cgroup/CONTROLLER`
//! (version 1). A limit of any group above holds too.

use std::fs;
use std::path::{Path, PathBuf};

const MOUNTED_AT: &str = "/sys/fs/cgroup";

/// A limit of a control group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    /// The most that is allowed.
    pub most: u64,
    /// The file that says so.
    pub file: PathBuf,
    /// The file that says how much is in use.
    in_use: PathBuf,
}

impl Limit {
    /// What is in use, if that can be read.
    pub fn in_use(&self) -> Option<u64> {
        number_in(&self.in_use)
    }
}

/// The least limit of memory in bytes; `None` where there is none.
pub fn memory() -> Option<Limit> {
    least(
        "memory",
        &[
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ],
    )
}

/// The least limit of threads; `None` where there is none.
pub fn threads() -> Option<Limit> {
    least("pids", &[("pids.max", "pids.current")])
}

fn least(controller: &str, names: &[(&str, &str)]) -> Option<Limit> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    least_of(&groups, Path::new(MOUNTED_AT), controller, names)
}

fn least_of(groups: &str, mounted_at: &Path, controller: &str, names: &[(&str, &str)]) -> Option<Limit> {
    let dirs = groups
        .lines()
        .flat_map(|line| dirs_of(line, mounted_at, controller));
    let limits = dirs.flat_map(|dir| {
        names.iter().filter_map(move |(most, in_use)| {
            let file = dir.join(most);
            // Version 1 writes a number near the largest for none.
            let most = number_in(&file).filter(|most| *most < 1 << 60)?;
            Some(Limit {
                most,
                in_use: dir.join(in_use),
                file,
            })
        })
    });
    limits.min_by_key(|limit| limit.most)
}

/// The directories of a line of `/proc/self/cgroup`, the group's and those above it, if it is of this controller.
fn dirs_of(line: &str, mounted_at: &Path, controller: &str) -> Vec<PathBuf> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else {
        return Vec::new();
    };
    let root = match controllers {
        // Version 2 has all of them in one tree.
        "" => mounted_at.to_owned(),
        named if named.split(',').any(|name| name == controller) => mounted_at.join(controller),
        _ => return Vec::new(),
    };
    // Inside of a container the group's own directory is often mounted as the root.
    let group = Path::new(group.trim_start_matches('/'));
    group.ancestors().map(|above| root.join(above)).collect()
}

fn number_in(file: &Path) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(root: &Path, name: &str, text: &str) {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn the_least_limit_of_a_group_and_those_above_it_holds() {
        let root = tempfile::tempdir().unwrap();
        let of = |groups: &str| {
            let names = [
                ("memory.max", "memory.current"),
                ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            ];
            least_of(groups, root.path(), "memory", &names).map(|limit| (limit.most, limit.in_use()))
        };
        put(root.path(), "system.slice/memory.max", "1000\n");
        put(root.path(), "system.slice/memory.current", "400\n");
        put(root.path(), "system.slice/a.service/memory.max", "max\n");
        assert_eq!(of("0::/system.slice/a.service\n"), Some((1000, Some(400))));
        put(root.path(), "system.slice/a.service/memory.max", "500\n");
        assert_eq!(of("0::/system.slice/a.service\n"), Some((500, None)));
        assert_eq!(of("0::/other\n"), None);
        assert_eq!(of("garbage\n"), None);
        put(root.path(), "memory/docker/1/memory.limit_in_bytes", "700\n");
        put(
            root.path(),
            "memory/docker/memory.limit_in_bytes",
            "9223372036854771712\n",
        );
        assert_eq!(
            of("9:name=systemd:/x\n4:memory:/docker/1\n0::/\n"),
            Some((700, None))
        );
    }
}
