//! Signed lists that the artist subscribes to: their names, and of each the newest edition.

use kinoflock_protocol::list::ListName;
use kinoflock_protocol::{Envelope, UnixMillis};
use serde::{Deserialize, Serialize};

use super::{Store, StoreError, file_names, read_json};

/// Name of the folder.
pub(super) const FOLDER: &str = "lists";

/// What is kept of a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListRecord {
    /// Which list, as text.
    pub name: String,
    /// Whether it was added by a command; else the configuration names it.
    pub added: bool,
    /// The newest edition, once there is one.
    pub edition: Option<Envelope>,
    /// When nodes were last asked for a newer one.
    pub asked_at: UnixMillis,
}

impl Store {
    /// What is kept of lists. A damaged file is passed over.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn lists(&self) -> Result<Vec<ListRecord>, StoreError> {
        let folder = self.root.join(FOLDER);
        let mut names = file_names(&folder)?;
        names.sort();
        Ok(names.iter().filter_map(|name| read_json(&folder.join(name)).ok().flatten()).collect())
    }

    /// What is kept of a list.
    #[must_use]
    pub fn list(&self, name: &ListName) -> Option<ListRecord> {
        read_json(&self.list_path(name)).ok().flatten()
    }

    /// Changes what is kept of a list, one process at a time.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn update_list(
        &self,
        name: &ListName,
        change: impl FnOnce(&mut ListRecord),
    ) -> Result<ListRecord, StoreError> {
        let _lock = self.lock()?;
        let new =
            || ListRecord { name: name.to_string(), added: false, edition: None, asked_at: UnixMillis(0) };
        let mut record = self.list(name).unwrap_or_else(new);
        change(&mut record);
        self.write_json(&self.list_path(name), &record)?;
        Ok(record)
    }

    /// Forgets a list. Tells whether it was there.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn remove_list(&self, name: &ListName) -> Result<bool, StoreError> {
        let path = self.list_path(name);
        match std::fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(StoreError::io("remove", &path)(error)),
        }
    }

    fn list_path(&self, name: &ListName) -> std::path::PathBuf {
        self.root.join(FOLDER).join(format!("{name}.json"))
    }
}
