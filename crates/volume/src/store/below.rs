//! The volumes directly below a URL, found without opening any.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;

use super::local::layout::MARKER;
use super::{Store, s3};
use crate::base::store_error::{StoreError, StoreErrorKind};
use crate::base::url::VolumeUrl;
use crate::base::volume_name::VolumeName;
use crate::store::options::StoreOptions;

/// What lies beside a volume has its name and this.
const BESIDE: &str = ".meta";

/// The names of the volumes directly below `url`, in their order: in a bucket what has objects both in `NAME/` and in `NAME.meta/`, in a
/// directory each store. Others are left out, and so are names that no client can ask for. Whether a volume is whole is not looked at.
///
/// # Errors
/// [`StoreError`]: there is no such bucket or directory, or it cannot be listed.
pub(crate) async fn volumes_below(
    url: &VolumeUrl,
    options: &StoreOptions,
) -> Result<Vec<VolumeName>, StoreError> {
    let found = match url {
        VolumeUrl::S3 { bucket, prefix } => {
            let store = s3::unproved(url, bucket, prefix, options).await?;
            with_what_lies_beside(store.parts_below().await?)
        }
        VolumeUrl::File { path } => {
            let dir = path.clone();
            let listed = tokio::task::spawn_blocking(move || stores_in(&dir)).await;
            let listed = listed.unwrap_or_else(|panic| Err(io::Error::other(panic.to_string())));
            listed.map_err(|e| {
                let kind = match e.kind() {
                    ErrorKind::NotFound => StoreErrorKind::NotFound,
                    ErrorKind::PermissionDenied => StoreErrorKind::AccessDenied,
                    _ => StoreErrorKind::Other,
                };
                StoreError::new("list", url, kind, e.to_string())
            })?
        }
    };
    Ok(found.iter().filter_map(|name| name.parse().ok()).collect())
}

/// Those of the names that are there with and without the ending.
fn with_what_lies_beside(parts: BTreeSet<String>) -> BTreeSet<String> {
    let is_volume = |name: &&String| parts.contains(&format!("{name}{BESIDE}"));
    parts.iter().filter(is_volume).cloned().collect()
}

fn stores_in(dir: &Path) -> io::Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if let Ok(name) = entry.file_name().into_string()
            && entry.path().join(MARKER).is_file()
        {
            found.insert(name);
        }
    }
    Ok(found)
}

impl Store {
    /// The parts of keys that directly follow the prefix and a slash, where another slash follows.
    async fn parts_below(&self) -> Result<BTreeSet<String>, StoreError> {
        let prefix = self.data_key("");
        let request = self.client.list_objects_v2().bucket(&self.bucket);
        let mut pages = request.prefix(&prefix).delimiter("/").into_paginator().send();
        let mut parts = BTreeSet::new();
        while let Some(page) = pages.next().await {
            let page = page.map_err(|error| self.error("list", &prefix, error))?;
            let names = page.common_prefixes().iter().filter_map(|found| {
                let part = found.prefix()?.strip_prefix(&prefix)?;
                part.strip_suffix('/')
            });
            parts.extend(names.map(str::to_owned));
        }
        Ok(parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::connect_for_create;

    #[test]
    fn a_volume_has_something_beside_it() {
        let parts = ["a", "a.meta", "b", "c.meta", "d.meta", "d.meta.meta"];
        let volumes = with_what_lies_beside(parts.map(str::to_owned).into());
        // The last one is no name that a volume may have.
        let named: Vec<_> = volumes
            .iter()
            .filter_map(|name| name.parse::<VolumeName>().ok())
            .collect();
        assert_eq!(named.iter().map(VolumeName::as_str).collect::<Vec<_>>(), ["a"]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_stores_in_a_directory_are_volumes() {
        let dir = tempfile::tempdir().unwrap();
        let above = VolumeUrl::parse(&format!("file://{}/all/", dir.path().display())).unwrap();
        let options = StoreOptions::default();
        let missing = volumes_below(&above, &options).await.unwrap_err();
        assert_eq!(missing.kind, StoreErrorKind::NotFound);
        for name in ["b", "a", "x@1"] {
            let url = VolumeUrl::parse(&format!("{above}{name}/")).unwrap();
            connect_for_create(&url, &options).await.unwrap();
        }
        fs::create_dir(dir.path().join("all/other")).unwrap();
        fs::write(dir.path().join("all/file"), "text").unwrap();
        let found = volumes_below(&above, &options).await.unwrap();
        assert_eq!(
            found.iter().map(VolumeName::as_str).collect::<Vec<_>>(),
            ["a", "b"]
        );
    }
}
