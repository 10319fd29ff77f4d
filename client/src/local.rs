//! Where a daemon on the same machine listens: a small file in the runtime folder.
//!
//! The daemon writes `node.json` when it listens and removes it when it stops; a client reads it before it asks
//! anywhere else. A user's own daemon writes to `$XDG_RUNTIME_DIR/kinoflock/node.json`, a system's to
//! `/run/kinoflock/node.json`. The file is a hint: whoever connects checks the node's key, which is its id.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use kinoflock_protocol::{NetworkId, NodeId};
use serde::{Deserialize, Serialize};

use crate::store::{StoreError, make_private_dir, unique, write_whole};

/// Name of the file in the runtime folder.
pub const FILE: &str = "node.json";
/// The runtime folder of a system's daemon.
pub const SYSTEM_FOLDER: &str = "/run/kinoflock";
/// Greatest file that is read, in bytes.
const MAX_BYTES: u64 = 64 * 1024;

/// What the daemon says about where it listens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalNode {
    /// Version of this file's form: 1.
    pub schema: u32,
    /// Which node.
    pub node_id: NodeId,
    /// In which network.
    pub network: NetworkId,
    /// Where it listens, as multiaddresses, with or without `/p2p/...`.
    pub addresses: Vec<String>,
    /// Its process.
    pub pid: u32,
    /// Its admin interface: the path of a socket, or `address:port`; none if it has none.
    pub admin: Option<String>,
}

impl LocalNode {
    /// Writes the file into a runtime folder, whole or not at all. The folder is made where it is missing.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn write(&self, folder: &Path) -> Result<PathBuf, StoreError> {
        make_private_dir(folder)?;
        let path = folder.join(FILE);
        let json = serde_json::to_vec_pretty(self).expect("invariant: such a file has a JSON form");
        write_whole(&folder.join(format!(".node-{}", unique())), &path, &json)?;
        Ok(path)
    }

    /// Reads the file of a runtime folder; `None` if there is none, or none that this release can read.
    #[must_use]
    pub fn read(folder: &Path) -> Option<Self> {
        let path = folder.join(FILE);
        if fs::metadata(&path).ok()?.len() > MAX_BYTES {
            return None;
        }
        serde_json::from_slice(&fs::read(&path).ok()?).ok()
    }

    /// Removes the file when the daemon stops, if it is still this daemon's.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn remove(&self, folder: &Path) -> Result<(), StoreError> {
        if Self::read(folder).as_ref() != Some(self) {
            return Ok(());
        }
        let path = folder.join(FILE);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(StoreError::io("remove", &path)(error)),
            _ => Ok(()),
        }
    }
}

/// The runtime folders in which a client looks, the user's own first.
#[must_use]
pub fn folders() -> Vec<PathBuf> {
    let user = std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty());
    let user = user.map(|folder| PathBuf::from(folder).join("kinoflock"));
    let data = directories::BaseDirs::new().map(|base| base.data_dir().join("kinoflock/node/run"));
    let system = cfg!(unix).then(|| PathBuf::from(SYSTEM_FOLDER));
    user.into_iter().chain(data).chain(system).collect()
}

/// The daemons of these runtime folders.
#[must_use]
pub fn find(folders: &[PathBuf]) -> Vec<LocalNode> {
    let mut nodes: Vec<LocalNode> = Vec::new();
    for node in folders.iter().filter_map(|folder| LocalNode::read(folder)) {
        if !nodes.iter().any(|known| known.node_id == node.node_id) {
            nodes.push(node);
        }
    }
    nodes
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_file_is_read_as_it_was_written_and_removed_by_its_writer_only() {
        let folder = tempfile::tempdir().unwrap();
        let node = LocalNode {
            schema: 1,
            node_id: NodeId::from_bytes([7; 32]),
            network: NetworkId::named("test"),
            addresses: vec!["/ip4/127.0.0.1/tcp/4001".to_owned()],
            pid: 12,
            admin: Some("/run/kinoflock/admin.sock".to_owned()),
        };
        assert_eq!(LocalNode::read(folder.path()), None);
        node.write(folder.path()).unwrap();
        assert_eq!(find(&[folder.path().to_owned(), folder.path().to_owned()]), std::slice::from_ref(&node));
        LocalNode { pid: 13, ..node.clone() }.remove(folder.path()).unwrap();
        assert_eq!(LocalNode::read(folder.path()), Some(node.clone()));
        node.remove(folder.path()).unwrap();
        assert_eq!(LocalNode::read(folder.path()), None);
        fs::write(folder.path().join(FILE), b"{").unwrap();
        assert_eq!(LocalNode::read(folder.path()), None);
    }
}
