//! The rooms of the crate know each other in one direction: a room names those below it in the table of
//! `docs/architecture.md`, and none above. The table is read from there.

use std::fs;
use std::path::{Path, PathBuf};

const ARCHITECTURE: &str = include_str!("../../../docs/architecture.md");

/// The folders and files right below `src/`, in the order of the table.
fn rooms() -> Vec<&'static str> {
    let section = ARCHITECTURE
        .split("\n## ")
        .find(|section| section.starts_with("Rooms\n"));
    let rows = section.expect("a section on rooms").lines();
    let cells = rows.filter_map(|row| row.strip_prefix("| `")?.split('`').next());
    cells
        .map(|name| name.trim_end_matches('/').trim_end_matches(".rs"))
        .collect()
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| match path.is_dir() {
            true => files(&path),
            false => vec![path],
        })
        .collect()
}

/// The lines of a file up to its tests, numbered, without comments.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let is_test = |lines: &[&str]| lines[0] == "#[cfg(test)]" && lines[lines.len() - 1].ends_with('{');
    let lines: Vec<&str> = text.lines().collect();
    let end = lines.windows(2).position(is_test).unwrap_or(lines.len());
    let code = lines.into_iter().take(end).enumerate();
    code.map(|(at, line)| (at + 1, line.split("//").next().unwrap_or_default()))
}

/// Files that only tests compile: those that a `#[cfg(test)]` stands before.
fn test_files(file: &Path, text: &str) -> Vec<PathBuf> {
    let lines: Vec<&str> = text.lines().collect();
    let marks = (0..lines.len()).filter(|&at| lines[at] == "#[cfg(test)]");
    let dir = file.parent().unwrap();
    marks
        .filter_map(|at| {
            let path = lines[at + 1].strip_prefix("#[path = \"");
            let line = lines[at + 1 + usize::from(path.is_some())];
            let module = line.strip_suffix(';')?.rsplit_once("mod ")?.1;
            Some(match path {
                Some(path) => dir.join(path.trim_end_matches("\"]")),
                None => dir.join(module),
            })
        })
        .collect()
}

/// What a file of this room, `depth` modules below the crate's root, must not name, one text each.
fn wrong_arrows(rooms: &[&str], room: &str, depth: usize, text: &str) -> Vec<String> {
    let here = rooms.iter().position(|name| *name == room);
    let mut wrong = Vec::new();
    for (line, code) in code(text) {
        if code.contains(&"super::".repeat(depth)) {
            wrong.push(format!(
                "line {line}: super:: leads out of {room}/; write crate::"
            ));
        }
        for path in code.split("crate::").skip(1) {
            let end = path.find(|c: char| !c.is_alphanumeric() && c != '_');
            let named = &path[..end.unwrap_or(path.len())];
            match rooms.iter().position(|name| *name == named) {
                Some(there) if Some(there) >= here => {}
                Some(_) => wrong.push(format!("line {line}: {room} -> {named} runs upward")),
                None => wrong.push(format!("line {line}: crate::{named} is no room of the table")),
            }
        }
    }
    wrong
}

#[test]
fn no_room_names_one_that_is_built_on_it() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let rooms = rooms();
    let files = files(&src);
    let texts = files.iter().map(|file| fs::read_to_string(file).unwrap());
    let read: Vec<(&PathBuf, String)> = files.iter().zip(texts).collect();
    let tests: Vec<PathBuf> = read
        .iter()
        .flat_map(|(file, text)| test_files(file, text))
        .collect();
    let is_test = |file: &Path| {
        tests
            .iter()
            .any(|t| file.starts_with(t) || file == t.with_extension("rs"))
    };
    let (mut wrong, mut seen) = (Vec::new(), Vec::new());
    for (file, text) in read.iter().filter(|(file, _)| !is_test(file)) {
        let place = file.strip_prefix(&src).unwrap().with_extension("");
        let names: Vec<&str> = place.iter().map(|part| part.to_str().unwrap()).collect();
        if names == ["lib"] {
            continue;
        }
        let depth = names.iter().filter(|name| **name != "mod").count();
        seen.push(names[0].to_owned());
        let arrows = wrong_arrows(&rooms, names[0], depth, text);
        wrong.extend(
            arrows
                .iter()
                .map(|arrow| format!("{}.rs, {arrow}", place.display())),
        );
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    seen.sort();
    seen.dedup();
    let mut listed = rooms.clone();
    listed.sort();
    assert_eq!(
        seen, listed,
        "the table in docs/architecture.md lists what is in src/"
    );
}

#[test]
fn what_runs_upward_is_found() {
    let wrong = |depth, text| wrong_arrows(&["engine", "store", "base"], "store", depth, text).len();
    assert_eq!(
        wrong(
            2,
            "use super::s3::get;\nuse crate::base::{url, units};\nuse crate::store::Store;\n"
        ),
        0
    );
    assert_eq!(wrong(2, "use crate::engine::Engine;\n"), 1);
    assert_eq!(
        wrong(2, "fn f(a: crate::base::Url, e: &crate::engine::Engine) {}\n"),
        1
    );
    assert_eq!(wrong(2, "use crate::Volume;\n"), 1, "by way of the root");
    assert_eq!(wrong(2, "use super::super::engine::Engine;\n"), 1);
    assert_eq!(wrong(1, "use super::engine::Engine;\n"), 1, "from mod.rs");
    assert_eq!(
        wrong(
            2,
            "// as crate::engine does\n#[cfg(test)]\nmod tests {\n    use crate::engine::Engine;\n}\n"
        ),
        0
    );
}
