//! The formats of images.

use std::path::Path;

use anyhow::{Result, bail};
use clap::ValueEnum;

/// As much of a file as tells its format, in bytes.
pub const HEAD_BYTES: usize = 64;

/// How an image is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Byte for byte
    Raw,
    /// QEMU's
    Qcow2,
    /// VMware's
    Vmdk,
    /// Hyper-V's
    Vhdx,
}

impl Format {
    /// Its name, as QEMU has it, too.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhdx => "vhdx",
        }
    }
}

/// The format of a file that begins with these bytes: raw, where nothing says otherwise.
pub fn of_content(head: &[u8], path: &Path) -> Result<Format> {
    let known: [(&[u8], Format); 4] = [
        (b"QFI\xfb", Format::Qcow2),
        (b"KDMV", Format::Vmdk),
        (b"# Disk DescriptorFile", Format::Vmdk),
        (b"vhdxfile", Format::Vhdx),
    ];
    if let Some((_, format)) = known.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Ok(*format);
    }
    let packed: [(&[u8], &str); 4] = [
        (b"\x1f\x8b", "gzip -dc"),
        (b"\xfd7zXZ\0", "xz -dc"),
        (b"\x28\xb5\x2f\xfd", "zstd -dc"),
        (b"BZh", "bzip2 -dc"),
    ];
    if let Some((_, unpack)) = packed.iter().find(|(magic, _)| head.starts_with(magic)) {
        let path = path.display();
        bail!(
            "{path} is compressed: give it through a pipe, {unpack} {path} | hypernbd import - URL --size SIZE (or add --format raw \
             to import its bytes as they are)"
        );
    }
    Ok(Format::Raw)
}

/// The format that a file of this name is to have: raw, where nothing says otherwise.
pub fn of_name(path: &Path) -> Result<Format> {
    let extension = path.extension().and_then(|extension| extension.to_str());
    match extension.unwrap_or_default().to_ascii_lowercase().as_str() {
        "qcow2" => Ok(Format::Qcow2),
        "vmdk" => Ok(Format::Vmdk),
        "vhdx" => Ok(Format::Vhdx),
        other @ ("vdi" | "vhd" | "vpc" | "qed" | "qcow" | "gz" | "xz" | "zst" | "bz2") => bail!(
            "{} ends in .{other}, a format that is not written here: name it .raw, .qcow2, .vmdk or .vhdx, or add --format",
            path.display()
        ),
        _ => Ok(Format::Raw),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_files_content_tells_its_format() {
        let path = Path::new("/a");
        for (head, format) in [
            (&b"QFI\xfb\0\0\0\x03"[..], Format::Qcow2),
            (b"KDMV\x01", Format::Vmdk),
            (b"# Disk DescriptorFile\nversion=1", Format::Vmdk),
            (b"vhdxfileQ\0E\0", Format::Vhdx),
            (b"\xeb\x63\x90", Format::Raw),
            (b"QFI", Format::Raw),
            (b"", Format::Raw),
        ] {
            assert_eq!(of_content(head, path).unwrap(), format, "{head:?}");
        }
        let error = of_content(b"\x1f\x8b\x08", path).unwrap_err().to_string();
        assert!(error.contains("gzip -dc /a | hypernbd import"), "{error}");
    }

    #[test]
    fn a_files_name_tells_the_format_that_is_wanted() {
        for (name, format) in [
            ("a.qcow2", Format::Qcow2),
            ("a.VMDK", Format::Vmdk),
            ("b/a.vhdx", Format::Vhdx),
            ("a.img", Format::Raw),
            ("a", Format::Raw),
            (".qcow2", Format::Raw),
        ] {
            assert_eq!(of_name(Path::new(name)).unwrap(), format, "{name}");
        }
        for name in ["a.vdi", "a.raw.gz"] {
            let error = of_name(Path::new(name)).unwrap_err().to_string();
            assert!(error.contains("--format"), "{error}");
        }
    }
}
