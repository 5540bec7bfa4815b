//! What may be written where: pure decisions about places, labels and histories.

use super::Request;
use crate::base::checkpoint_id::CheckpointId;
use crate::base::error::VolumeError;
use crate::base::url::VolumeUrl;
use crate::base::volume_id::VolumeId;
use crate::meta::label::Label;

fn invalid<T>(reason: String) -> Result<T, VolumeError> {
    Err(VolumeError::InvalidInput(reason))
}

/// Whether these can be the places of a volume and its replica.
pub(super) fn check_places(request: &Request<'_>) -> Result<(), VolumeError> {
    let (url, to) = (request.url, request.to);
    let is_one_store = match (url, to) {
        (VolumeUrl::File { .. }, VolumeUrl::File { .. }) => true,
        (VolumeUrl::S3 { .. }, VolumeUrl::S3 { .. }) => request.store_options == request.to_options,
        _ => false,
    };
    if !is_one_store {
        return Ok(());
    }
    if url == to {
        return invalid(format!("{url} cannot be its own replica: choose another place"));
    }
    if is_inside(to, url) || is_inside(url, to) {
        return invalid(format!(
            "one of {url} and {to} is inside the other, and would be removed with it: choose a place beside it"
        ));
    }
    Ok(())
}

fn is_inside(inner: &VolumeUrl, outer: &VolumeUrl) -> bool {
    match (inner, outer) {
        (VolumeUrl::File { path: inner }, VolumeUrl::File { path: outer }) => inner.starts_with(outer),
        (_, VolumeUrl::S3 { .. }) => inner.to_string().starts_with(&outer.to_string()),
        _ => false,
    }
}

/// Whether the volume with this label is a replica of the original, so that it may be written to.
///
/// # Errors
/// [`VolumeError::InvalidInput`] that says whose place it is.
pub(super) fn check_label(
    label: &Label,
    is_elsewhere: bool,
    to: &VolumeUrl,
    original: (&VolumeUrl, VolumeId),
) -> Result<(), VolumeError> {
    let (url, id) = original;
    if label.deletion.is_some() {
        return invalid(format!(
            "a deletion of {to} was interrupted, or is under way: end it with hypernbd delete {to}, then replicate to it"
        ));
    }
    match &label.replica_of {
        Some(of) if of.volume_id != id => invalid(format!(
            "{to} is a replica of another volume ({}, volume {}): choose another place",
            of.url, of.volume_id
        )),
        Some(_) if is_elsewhere => invalid(format!(
            "what is at {to} is a copy of a replica, or was moved there: choose another place, or delete it first"
        )),
        Some(_) => Ok(()),
        None if label.parent == Some(id) => invalid(format!(
            "{to} began as a copy of {url}, and has been a volume of its own since it was opened for writing: nothing is copied over \
             it; choose another place, or delete it first"
        )),
        None => invalid(format!(
            "{to} is another volume ({}), and no replica of {url}: choose another place",
            label.volume_id
        )),
    }
}

/// What the original says of the replica's newest checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Continues {
    /// It has the very same.
    Known,
    /// It keeps that one no more, and so cannot tell by it.
    Unknown,
    /// It went back before that one.
    WentBack,
    /// It has another one of that number.
    Other,
}

/// How the original's history goes on from the replica's newest checkpoint. `kept` says whether the original's entry with that number, or
/// else the object that it stored first, is of that checkpoint; nothing when there is neither.
pub(super) fn continues(of_replica: CheckpointId, newest: CheckpointId, kept: Option<bool>) -> Continues {
    match kept {
        _ if newest.cno < of_replica.cno => Continues::WentBack,
        _ if newest.cno == of_replica.cno => match newest == of_replica {
            true => Continues::Known,
            false => Continues::Other,
        },
        // Before the first checkpoint there is nothing to go on from.
        _ if of_replica.cno == 0 => Continues::Unknown,
        Some(true) => Continues::Known,
        Some(false) => Continues::Other,
        None => Continues::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::checkpoint_id::InodeCheck;
    use crate::meta::label::Original;
    use crate::options::StoreOptions;

    fn url(text: &str) -> VolumeUrl {
        VolumeUrl::parse(text).unwrap()
    }

    #[test]
    fn a_replica_is_neither_the_volume_itself_nor_inside_it_nor_around_it() {
        let here = StoreOptions::default();
        let there = StoreOptions {
            region: Some("eu-west-1".into()),
            ..StoreOptions::default()
        };
        let check = |from: &str, to: &str, to_options: &StoreOptions| {
            let (from, to) = (url(from), url(to));
            let request = Request {
                url: &from,
                store_options: &here,
                to: &to,
                to_options,
                takes_over: false,
                follows: None,
            };
            check_places(&request).is_ok()
        };
        for (from, to, is_good) in [
            ("s3://bucket/a", "s3://bucket/a", false),
            ("s3://bucket/a", "s3://bucket/a/b", false),
            ("s3://bucket/a/b", "s3://bucket/a", false),
            ("s3://bucket/a", "s3://bucket/ab", true),
            ("s3://bucket/a", "s3://other/a", true),
            ("s3://bucket/a", "file:///a", true),
            ("file:///a", "s3://bucket/a", true),
            ("file:///a", "file:///a", false),
            ("file:///a", "file:///a/b", false),
            ("file:///a/b", "file:///a", false),
            ("file:///a", "file:///ab", true),
        ] {
            assert_eq!(check(from, to, &here), is_good, "{from} to {to}");
        }
        assert!(check("s3://bucket/a", "s3://bucket/a", &there), "another store");
    }

    #[test]
    fn only_a_replica_of_the_volume_is_written_to() {
        let (id, other) = (VolumeId::random(), VolumeId::random());
        let of = |volume_id| {
            Some(Original {
                url: "s3://bucket/a/".into(),
                volume_id,
            })
        };
        let label = |replica_of, parent, deletion| Label {
            volume_id: VolumeId::random(),
            created_ms: 1,
            origin: None,
            place: None,
            parent,
            deletion,
            is_clone: false,
            replica_of,
        };
        let (from, to) = (url("s3://bucket/a"), url("s3://bucket/b"));
        let said = |label: Label, is_elsewhere| check_label(&label, is_elsewhere, &to, (&from, id)).err();
        assert!(said(label(of(id), Some(id), None), false).is_none());
        for (refused, is_elsewhere, why) in [
            (label(of(id), Some(id), None), true, "a copy of a replica"),
            (
                label(of(other), Some(other), None),
                false,
                "replica of another volume",
            ),
            (label(None, Some(id), None), false, "a volume of its own"),
            (label(None, None, None), false, "is another volume"),
            (label(of(id), Some(id), Some(7)), false, "deletion"),
        ] {
            let said = said(refused, is_elsewhere).expect(why).to_string();
            assert!(said.contains(why), "{said}");
        }
    }

    #[test]
    fn a_replica_goes_on_only_in_the_history_that_it_is_of() {
        let id = |cno, check| CheckpointId {
            cno,
            check: InodeCheck::from_bits(check),
        };
        for (of_replica, newest, kept, expected) in [
            (id(5, 55), id(9, 99), Some(true), Continues::Known),
            (id(5, 55), id(9, 99), Some(false), Continues::Other),
            (id(5, 55), id(9, 99), None, Continues::Unknown),
            (id(5, 55), id(5, 55), None, Continues::Known),
            (id(5, 55), id(5, 56), Some(true), Continues::Other),
            (id(5, 55), id(4, 44), Some(true), Continues::WentBack),
            (id(0, 1), id(4, 44), Some(true), Continues::Unknown),
            (id(0, 1), id(0, 1), None, Continues::Known),
        ] {
            assert_eq!(
                continues(of_replica, newest, kept),
                expected,
                "{of_replica} {newest} {kept:?}"
            );
        }
    }
}
