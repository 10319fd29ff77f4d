//! Sealing and opening whole files, chunk by chunk: see [`kinoflock_protocol::seal`].
//!
//! The result is written to its place only when it is whole: to a temporary name beside it, synced, renamed.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::Path;

use kinoflock_protocol::BlobId;
use kinoflock_protocol::clip::BlobRef;
use kinoflock_protocol::limits::CHUNK_BYTES;
use kinoflock_protocol::seal::{HEADER_BYTES, Opener, PLAIN_CHUNK, SealKey, Sealer};

/// Seals a file's content, whose id is `plain`; gives the sealed blob.
///
/// # Errors
/// When the files cannot be read or written.
pub fn seal_file(key: &SealKey, plain: &BlobId, from: &Path, to: &Path) -> io::Result<BlobRef> {
    let mut sealer = Sealer::new(key, plain);
    let mut input = BufReader::new(File::open(from)?);
    write_whole(to, |out| {
        out.put(&sealer.header())?;
        each_chunk(&mut input, PLAIN_CHUNK, |mut chunk, is_last| {
            sealer.seal(&mut chunk, is_last);
            out.put(&chunk)
        })
    })
}

/// Opens a sealed file; gives what it held, which must be the content of the id `plain`.
///
/// # Errors
/// `InvalidData` when key or bytes are not the right ones; and when the files cannot be read or written.
pub fn open_file(key: &SealKey, plain: &BlobId, from: &Path, to: &Path) -> io::Result<BlobRef> {
    open_checked(key, Some(*plain), from, to)
}

/// Opens a sealed file whose content nobody named beforehand; gives what it held. That it was sealed with this key is
/// certain; what it is, the caller checks.
///
/// # Errors
/// As [`open_file`].
pub fn open_unnamed(key: &SealKey, from: &Path, to: &Path) -> io::Result<BlobRef> {
    open_checked(key, None, from, to)
}

fn open_checked(key: &SealKey, expected: Option<BlobId>, from: &Path, to: &Path) -> io::Result<BlobRef> {
    let mut input = BufReader::new(File::open(from)?);
    let mut header = [0; HEADER_BYTES];
    input.read_exact(&mut header)?;
    let mut opener = Opener::new(key, header).map_err(invalid)?;
    write_checked(to, expected, |out| {
        each_chunk(&mut input, CHUNK_BYTES, |mut chunk, is_last| {
            opener.open(&mut chunk, is_last).map_err(invalid)?;
            out.put(&chunk)
        })
    })
}

/// A file being written, and the hash of what it holds so far.
struct Out {
    file: BufWriter<File>,
    hasher: blake3::Hasher,
    len: u64,
}

impl Out {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        self.file.write_all(bytes)
    }
}

fn write_whole(to: &Path, fill: impl FnOnce(&mut Out) -> io::Result<()>) -> io::Result<BlobRef> {
    write_checked(to, None, fill)
}

fn write_checked(
    to: &Path,
    expected: Option<BlobId>,
    fill: impl FnOnce(&mut Out) -> io::Result<()>,
) -> io::Result<BlobRef> {
    let mut name = to.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    let part = to.with_file_name(name);
    let written = (|| {
        let file = BufWriter::new(File::create(&part)?);
        let mut out = Out { file, hasher: blake3::Hasher::new(), len: 0 };
        fill(&mut out)?;
        out.file.flush()?;
        out.file.get_ref().sync_all()?;
        let blob = BlobRef { id: BlobId::from_bytes(*out.hasher.finalize().as_bytes()), len: out.len };
        if expected.is_some_and(|expected| expected != blob.id) {
            return Err(invalid("the opened content is another than was stated"));
        }
        fs::rename(&part, to)?;
        Ok(blob)
    })();
    if written.is_err() {
        // What is left of it would only take room; the first error is the one to tell.
        let _ = fs::remove_file(&part);
    }
    written
}

/// Calls `with` for each chunk and whether it is the last; an empty input is one empty chunk.
fn each_chunk(
    input: &mut impl Read,
    len: usize,
    mut with: impl FnMut(Vec<u8>, bool) -> io::Result<()>,
) -> io::Result<()> {
    let mut chunk = read_up_to(input, len)?;
    loop {
        let next = if chunk.len() < len { Vec::new() } else { read_up_to(input, len)? };
        let is_last = next.is_empty();
        with(std::mem::replace(&mut chunk, next), is_last)?;
        if is_last {
            return Ok(());
        }
    }
}

fn read_up_to(input: &mut impl Read, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    input.take(len as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn invalid(error: impl ToString) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use kinoflock_protocol::query::{JobQuery, QueryAction};
    use kinoflock_protocol::seal::{seal_bytes, sealed_len};
    use kinoflock_protocol::{Envelope, JobId, Keypair, NetworkId, NodeId, Nonce, UnixMillis};

    fn key(of: u8) -> SealKey {
        let query = JobQuery {
            job: JobId::from_bytes([of; 32]),
            action: QueryAction::Status,
            node: NodeId::from_bytes([1; 32]),
            issued_at: UnixMillis(1),
            nonce: Nonce::from_bytes([2; 16]),
        };
        let (keypair, network) = (Keypair::from_seed(&[1; 32]), NetworkId::named("test"));
        SealKey::of_job(&Envelope::seal(&keypair, &network, &query).unwrap())
    }

    #[test]
    fn a_file_is_sealed_as_its_bytes_are_and_opens_again() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for len in [0, 5, PLAIN_CHUNK, PLAIN_CHUNK + 1, 2 * PLAIN_CHUNK] {
            let plain = vec![3; len];
            fs::write(at("plain"), &plain).unwrap();
            let id = BlobId::of(&plain);
            let sealed = seal_file(&key(1), &id, &at("plain"), &at("sealed")).unwrap();
            assert_eq!(fs::read(at("sealed")).unwrap(), seal_bytes(&key(1), &plain));
            assert_eq!(
                (sealed.id, sealed.len),
                (BlobId::of(&fs::read(at("sealed")).unwrap()), sealed_len(len as u64))
            );
            assert_eq!(open_file(&key(1), &id, &at("sealed"), &at("opened")).unwrap().id, id);
            assert_eq!(fs::read(at("opened")).unwrap(), plain);
        }
    }

    #[test]
    fn another_key_or_another_content_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("plain"), b"frames").unwrap();
        let id = BlobId::of(b"frames");
        seal_file(&key(1), &id, &at("plain"), &at("sealed")).unwrap();
        for (key, id) in [(key(2), id), (key(1), BlobId::of(b"other"))] {
            let error = open_file(&key, &id, &at("sealed"), &at("opened")).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
        let mut left: Vec<_> =
            fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["plain", "sealed"]);
    }
}
