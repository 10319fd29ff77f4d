//! The store's index: what a listing shows, so that it need not open every record. A cache, nothing more.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::time::UNIX_EPOCH;

use kinoflock_protocol::{ClipId, JobId, NodeId, UnixMillis};
use serde::{Deserialize, Serialize};

use super::{JobRecord, RecordState, Store, StoreError, file_names, read_json};

/// A job in a listing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobEntry {
    /// Which job.
    pub job: JobId,
    /// When its record was made.
    pub created_at: UnixMillis,
    /// How it stands.
    pub state: RecordState,
    /// Which node has it.
    pub node: NodeId,
    /// The name that the node gave itself.
    pub node_name: String,
    /// The name of the model.
    pub model_name: String,
    /// Its clip.
    pub clip: Option<ClipId>,
    /// Length of the clip in bytes.
    pub clip_len: u64,
    /// Why it failed.
    pub error: Option<String>,
}

/// A clip in a listing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ClipEntry {
    /// Which clip.
    pub clip: ClipId,
    /// Its length in bytes.
    pub len: u64,
    /// When its record was made.
    pub created_at: UnixMillis,
    /// The job that made it; none if it came by a ticket.
    pub job: Option<JobId>,
    /// The name of the model, if it is known.
    pub model_name: String,
    /// Whether its bytes are here.
    pub here: bool,
}

/// What a record's file looked like when the index read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    len: u64,
    modified_ns: u64,
    number: u64,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Index {
    jobs: BTreeMap<String, (Seen, JobEntry)>,
}

impl Store {
    /// Every job, oldest first. A damaged record is passed over; [`Store::job`] says what is wrong with it.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn jobs(&self) -> Result<Vec<JobEntry>, StoreError> {
        let path = self.root().join("index.json");
        // A damaged index is made again like a missing one.
        let mut old: Index = read_json(&path).ok().flatten().unwrap_or_default();
        let mut index = Index::default();
        let mut changed = false;
        for name in file_names(&self.root().join("jobs"))? {
            if !name.ends_with(".json") {
                continue;
            }
            let file = self.root().join("jobs").join(&name);
            // Gone since it was listed: removed by another process.
            let Ok(data) = fs::metadata(&file) else { continue };
            let seen = Seen::of(&data);
            match old.jobs.remove(&name) {
                Some((before, entry)) if before == seen => {
                    index.jobs.insert(name, (seen, entry));
                }
                _ => {
                    changed = true;
                    if let Ok(Some(record)) = read_json::<JobRecord>(&file) {
                        index.jobs.insert(name, (seen, JobEntry::of(&record)));
                    }
                }
            }
        }
        if changed || !old.jobs.is_empty() {
            // A listing must work on a full disk too.
            let _ = self.write_json(&path, &index);
        }
        let mut jobs: Vec<_> = index.jobs.into_values().map(|(_, entry)| entry).collect();
        jobs.sort_by_key(|entry| (entry.created_at, entry.job));
        Ok(jobs)
    }

    /// Every clip that was made for this artist or came by a ticket, oldest first.
    ///
    /// # Errors
    /// When a folder cannot be read.
    pub fn clips(&self) -> Result<Vec<ClipEntry>, StoreError> {
        let mut clips = Vec::new();
        for entry in self.jobs()? {
            let Some(clip) = entry.clip else { continue };
            let here = self.has_blob(&clip.into());
            let JobEntry { job, created_at, model_name, clip_len: len, .. } = entry;
            clips.push(ClipEntry { clip, len, created_at, job: Some(job), model_name, here });
        }
        for name in file_names(&self.root().join("clips"))? {
            let Some(Ok(id)) = name.strip_suffix(".json").map(str::parse) else { continue };
            let Ok(Some(record)) = self.clip_record(&id) else { continue };
            let here = self.has_blob(&id.into());
            let (clip, len, created_at) = (record.clip, record.len, record.got_at);
            clips.push(ClipEntry { clip, len, created_at, job: None, model_name: String::new(), here });
        }
        clips.sort_by_key(|entry| (entry.created_at, entry.clip));
        Ok(clips)
    }
}

impl JobEntry {
    fn of(record: &JobRecord) -> Self {
        Self {
            job: record.job,
            created_at: record.created_at,
            state: record.state,
            node: record.node,
            node_name: record.node_name.clone(),
            model_name: record.model_name.clone(),
            clip: record.clip.map(|clip| clip.id.into()),
            clip_len: record.clip.map_or(0, |clip| clip.len),
            error: record.error.as_ref().map(|error| error.text.clone()),
        }
    }
}

impl Seen {
    fn of(data: &Metadata) -> Self {
        let modified = data.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let modified_ns = modified.map_or(0, |since| since.as_nanos() as u64);
        Self { len: data.len(), modified_ns, number: number(data) }
    }
}

/// A renamed file has a new number, even within one tick of the file system's clock.
#[cfg(unix)]
fn number(data: &Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(data)
}

#[cfg(not(unix))]
fn number(_: &Metadata) -> u64 {
    0
}
