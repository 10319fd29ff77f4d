//! Who this node is: one 32-byte seed file and the epoch of its receipt chain.
//!
//! - `node.key`: 32 raw bytes, mode 0600, the ed25519 seed. It is the libp2p key and the signing key.
//! - `node.epoch`: 32 random bytes made with it. Chain id = key + epoch, so that a node restored from a backup opens a
//!   new chain (delete the epoch, or [`Identity::renew_epoch`]) instead of signing a second receipt with an old number.
//!
//! Both are written to a temporary name, synced, and linked into place, so that a crash leaves all or nothing and an
//! existing key is never overwritten. A key that others on the machine can read is refused, not silently repaired: it
//! may already have been copied, and its owner should know.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use kinoflock_protocol::id::{ChainId, Keypair, NodeId};
use zeroize::Zeroizing;

/// Length of the seed and of the epoch, in bytes.
const SECRET_BYTES: usize = 32;

/// File name of the seed.
const KEY_FILE: &str = "node.key";

/// File name of the epoch.
const EPOCH_FILE: &str = "node.epoch";

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// No key yet.
    #[error("no key at {}; make one with: kinoflockd init", path.display())]
    Missing {
        /// Where it should be.
        path: PathBuf,
    },
    /// There is one already, and it will not be overwritten.
    #[error("{} exists already; a node keeps its key (move the file away to make a new one)", path.display())]
    Exists {
        /// The existing key.
        path: PathBuf,
    },
    /// Others may read it.
    #[error("{} is open to others (mode {given:03o}, at most 600 is allowed); close it with: chmod 600 {}", path.display(), path.display())]
    Open {
        /// The key.
        path: PathBuf,
        /// Its permission bits.
        given: u32,
    },
    /// It is no regular file.
    #[error("{} is no regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// It has the wrong length.
    #[error("{} has {given} bytes, {limit} are needed; it is damaged or no node key, restore it from a backup", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Bytes needed.
        limit: usize,
        /// Bytes found.
        given: u64,
    },
    /// The system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The system gave no random bytes.
    #[error("no random bytes from the system: {0}")]
    Random(getrandom::Error),
}

impl IdentityError {
    /// A short stable name for metrics and `--json`.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Missing { .. } => "key_missing",
            Self::Exists { .. } => "key_exists",
            Self::Open { .. } => "key_open",
            Self::NotAFile { .. } => "key_not_a_file",
            Self::Length { .. } => "key_length",
            Self::Io { .. } => "key_io",
            Self::Random(_) => "random",
        }
    }
}

/// A node's keys and its receipt chain.
#[derive(Debug, Clone)]
pub struct Identity {
    keypair: Keypair,
    chain: ChainId,
}

impl Identity {
    /// Makes a new key and epoch in `dir`, which is created with mode 0700 where it is missing.
    ///
    /// # Errors
    /// When there is a key already, or the disk refuses.
    pub fn create(dir: &Path) -> Result<Self, IdentityError> {
        make_private_dir(dir)?;
        let path = dir.join(KEY_FILE);
        // The epoch goes first: a key without an epoch would have to guess whether it ever had one.
        if path.exists() {
            return Err(IdentityError::Exists { path });
        }
        write_new(&dir.join(EPOCH_FILE), &*random_bytes()?, true)?;
        write_new(&path, &*random_bytes()?, false)?;
        Self::load(dir)
    }

    /// Reads the identity of `dir`.
    ///
    /// # Errors
    /// When the key is missing, open to others, unreadable, or of the wrong length.
    pub fn load(dir: &Path) -> Result<Self, IdentityError> {
        let seed = read_secret(&dir.join(KEY_FILE))?;
        let epoch = match read_secret(&dir.join(EPOCH_FILE)) {
            // A backup of the key alone: what was signed under the old epoch is unknown here, so this is a new chain.
            Err(IdentityError::Missing { .. }) => {
                write_new(&dir.join(EPOCH_FILE), &*random_bytes()?, false)?;
                read_secret(&dir.join(EPOCH_FILE))?
            }
            other => other?,
        };
        let keypair = Keypair::from_seed(&seed);
        let chain = ChainId::new(&keypair.node_id(), &epoch);
        Ok(Self { keypair, chain })
    }

    /// [`load`](Self::load), or [`create`](Self::create) where there is no key.
    ///
    /// # Errors
    /// Those of both.
    pub fn load_or_create(dir: &Path) -> Result<Self, IdentityError> {
        match Self::load(dir) {
            Err(IdentityError::Missing { .. }) => Self::create(dir),
            other => other,
        }
    }

    /// Opens a new receipt chain for the same key, as after a restore from a backup.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn renew_epoch(dir: &Path) -> Result<Self, IdentityError> {
        write_new(&dir.join(EPOCH_FILE), &*random_bytes()?, true)?;
        Self::load(dir)
    }

    /// The signing key, which is the libp2p key too.
    #[must_use]
    pub const fn keypair(&self) -> &Keypair {
        &self.keypair
    }

    /// The node.
    #[must_use]
    pub fn node_id(&self) -> NodeId {
        self.keypair.node_id()
    }

    /// The chain that this node's receipts are numbered in.
    #[must_use]
    pub const fn chain(&self) -> ChainId {
        self.chain
    }
}

fn read_secret(path: &Path) -> Result<Zeroizing<[u8; SECRET_BYTES]>, IdentityError> {
    let io = |action| move |source| IdentityError::Io { action, path: path.to_owned(), source };
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(IdentityError::Missing { path: path.to_owned() });
        }
        Err(error) => return Err(io("read")(error)),
    };
    // Asked of the open file, so that nobody can swap it in between.
    let metadata = file.metadata().map_err(io("look at"))?;
    if !metadata.is_file() {
        return Err(IdentityError::NotAFile { path: path.to_owned() });
    }
    refuse_open_permissions(path, &metadata)?;
    let wrong_length = |given| IdentityError::Length { path: path.to_owned(), limit: SECRET_BYTES, given };
    if metadata.len() != SECRET_BYTES as u64 {
        return Err(wrong_length(metadata.len()));
    }
    let mut secret = Zeroizing::new([0; SECRET_BYTES]);
    file.read_exact(secret.as_mut_slice()).map_err(io("read"))?;
    Ok(secret)
}

#[cfg(unix)]
fn refuse_open_permissions(path: &Path, metadata: &fs::Metadata) -> Result<(), IdentityError> {
    use std::os::unix::fs::PermissionsExt;
    let given = metadata.permissions().mode() & 0o777;
    if given & 0o077 == 0 { Ok(()) } else { Err(IdentityError::Open { path: path.to_owned(), given }) }
}

/// Windows keeps files of a profile to its user by inherited ACLs.
#[cfg(not(unix))]
fn refuse_open_permissions(_: &Path, _: &fs::Metadata) -> Result<(), IdentityError> {
    Ok(())
}

fn write_new(path: &Path, secret: &[u8; SECRET_BYTES], replace: bool) -> Result<(), IdentityError> {
    let io = |action| move |source| IdentityError::Io { action, path: path.to_owned(), source };
    let temporary = path.with_extension(format!("tmp{}", std::process::id()));
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    // Only a crashed process of the same id can have left one.
    let _ = fs::remove_file(&temporary);
    let mut file = options.open(&temporary).map_err(io("create"))?;
    file.write_all(secret).and_then(|()| file.sync_all()).map_err(io("write"))?;
    let placed = if replace { fs::rename(&temporary, path) } else { fs::hard_link(&temporary, path) };
    let _ = fs::remove_file(&temporary);
    match placed {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            return Err(IdentityError::Exists { path: path.to_owned() });
        }
        Err(error) => return Err(io("create")(error)),
    }
    let dir = path.parent().unwrap_or(Path::new("."));
    #[cfg(unix)]
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io("sync the folder of"))?;
    #[cfg(not(unix))]
    let _ = dir;
    Ok(())
}

fn make_private_dir(dir: &Path) -> Result<(), IdentityError> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(dir).map_err(|source| IdentityError::Io { action: "create", path: dir.to_owned(), source })
}

fn random_bytes() -> Result<Zeroizing<[u8; SECRET_BYTES]>, IdentityError> {
    let mut bytes = Zeroizing::new([0; SECRET_BYTES]);
    getrandom::fill(bytes.as_mut_slice()).map_err(IdentityError::Random)?;
    Ok(bytes)
}

#[cfg(all(test, unix))]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_created_identity_loads_again_and_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let made = Identity::load_or_create(&dir.path().join("state")).unwrap();
        let loaded = Identity::load_or_create(&dir.path().join("state")).unwrap();
        assert_eq!((made.node_id(), made.chain()), (loaded.node_id(), loaded.chain()));
        for name in [KEY_FILE, EPOCH_FILE] {
            let mode = fs::metadata(dir.path().join("state").join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        assert_eq!(fs::read_dir(dir.path().join("state")).unwrap().count(), 2, "no temporary file stays");
    }

    #[test]
    fn an_existing_key_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let made = Identity::create(dir.path()).unwrap();
        assert_eq!(Identity::create(dir.path()).unwrap_err().code(), "key_exists");
        let again = Identity::load(dir.path()).unwrap();
        assert_eq!((again.node_id(), again.chain()), (made.node_id(), made.chain()));
    }

    #[test]
    fn a_key_that_others_may_read_is_refused_with_the_command_that_closes_it() {
        let dir = tempfile::tempdir().unwrap();
        Identity::create(dir.path()).unwrap();
        let path = dir.path().join(KEY_FILE);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = Identity::load(dir.path()).unwrap_err().to_string();
        assert!(
            error.contains("mode 644") && error.contains(&format!("chmod 600 {}", path.display())),
            "{error}"
        );
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
        Identity::load(dir.path()).unwrap();
    }

    #[test]
    fn a_key_of_the_wrong_length_or_kind_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Identity::load(dir.path()).unwrap_err().code(), "key_missing");
        let path = dir.path().join(KEY_FILE);
        fs::write(&path, [1; 31]).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let error = Identity::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains("31 bytes, 32 are needed"), "{error}");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert_eq!(Identity::load(dir.path()).unwrap_err().code(), "key_not_a_file");
    }

    #[test]
    fn a_key_restored_without_its_epoch_opens_a_new_chain() {
        let dir = tempfile::tempdir().unwrap();
        let made = Identity::create(dir.path()).unwrap();
        fs::remove_file(dir.path().join(EPOCH_FILE)).unwrap();
        let restored = Identity::load(dir.path()).unwrap();
        assert_eq!(restored.node_id(), made.node_id());
        assert_ne!(restored.chain(), made.chain());
        assert_eq!(Identity::load(dir.path()).unwrap().chain(), restored.chain());
        assert_ne!(Identity::renew_epoch(dir.path()).unwrap().chain(), restored.chain());
    }
}
