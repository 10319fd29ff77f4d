//! A hub on loopback that speaks the real one's routes: a listing, files by commit, redirects to another origin for large
//! ones, entity tags, ranges. And the ways in which it can fail.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use kinoflock_node::models::hub::{FileHash, Hashing};
use serde_json::json;

pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What goes wrong, and what is wanted.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    /// Without this token nobody gets anything.
    pub(crate) token: Option<String>,
    /// The next answers about these files end after so many bytes.
    pub(crate) cuts: Vec<(String, usize)>,
    /// In these files one byte is another.
    pub(crate) wrong: Vec<String>,
    /// These files have more bytes than their listing says.
    pub(crate) longer: Vec<String>,
    /// Of these the redirect tells another hash than the listing.
    pub(crate) other_tag: Vec<String>,
    /// Of these the listing tells so many bytes.
    pub(crate) told_len: BTreeMap<String, u64>,
    /// Ranges are not heeded.
    pub(crate) no_ranges: bool,
    /// Every answer is a redirect to itself.
    pub(crate) circle: bool,
    /// Files are told to be of this commit.
    pub(crate) other_commit: Option<String>,
    /// So many questions are answered with status 503.
    pub(crate) unavailable: usize,
}

/// A question that came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) path: String,
    pub(crate) range: Option<u64>,
    pub(crate) token: Option<String>,
    /// Whether it came to the place where large files lie.
    pub(crate) far: bool,
}

struct State {
    repository: String,
    files: Mutex<BTreeMap<String, Vec<u8>>>,
    faults: Mutex<Faults>,
    asked: Mutex<Vec<Asked>>,
    far: String,
}

pub(crate) struct Server {
    pub(crate) address: String,
    state: Arc<State>,
}

impl Server {
    /// Serves a folder's files.
    pub(crate) fn of(folder: &Path) -> Self {
        Self::of_repository(folder, "Lightricks/LTX-Video-0.9.5")
    }

    /// The same under a repository's name.
    pub(crate) fn of_repository(folder: &Path, repository: &str) -> Self {
        let mut files = BTreeMap::new();
        walk(folder, "", &mut files);
        let (near, far) = (listen(), listen());
        let address = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(State {
            repository: repository.to_owned(),
            files: Mutex::new(files),
            faults: Mutex::default(),
            asked: Mutex::default(),
            far: address(&far),
        });
        let server = Self { address: address(&near), state: Arc::clone(&state) };
        for (listener, is_far) in [(near, false), (far, true)] {
            let state = Arc::clone(&state);
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let state = Arc::clone(&state);
                    // A client that hangs up is no fault of the server.
                    std::thread::spawn(move || drop(state.answer(stream.unwrap(), is_far)));
                }
            });
        }
        server
    }

    pub(crate) fn put(&self, path: &str, bytes: &[u8]) {
        self.state.files.lock().unwrap().insert(path.to_owned(), bytes.to_vec());
    }

    pub(crate) fn faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.state.faults.lock().unwrap());
    }

    /// What was asked since the last time.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.state.asked.lock().unwrap())
    }
}

impl State {
    fn answer(&self, mut stream: TcpStream, far: bool) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let target = line.split(' ').nth(1).unwrap_or_default().to_owned();
        let path = target.split('?').next().unwrap_or_default().to_owned();
        let mut asked = Asked { path: path.clone(), range: None, token: None, far };
        loop {
            line.clear();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            match name.to_ascii_lowercase().as_str() {
                "range" => {
                    asked.range = value.trim_start_matches("bytes=").trim_end_matches('-').parse().ok();
                }
                "authorization" => asked.token = value.strip_prefix("Bearer ").map(str::to_owned),
                _ => {}
            }
        }
        self.asked.lock().unwrap().push(asked.clone());
        let mut faults = self.faults.lock().unwrap();
        if faults.unavailable > 0 {
            faults.unavailable -= 1;
            return head(&mut stream, "503 Unavailable", &[], 0);
        }
        if faults.circle {
            return head(&mut stream, "302 Found", &[("Location", path.as_str())], 0);
        }
        if !far && faults.token.is_some() && faults.token != asked.token {
            return head(&mut stream, "401 Unauthorized", &[], 0);
        }
        let commit = faults.other_commit.clone().unwrap_or_else(|| COMMIT.to_owned());
        if path == format!("/api/models/{}/revision/main", self.repository) {
            let listing = self.listing(&faults).to_string();
            head(&mut stream, "200 OK", &[("Content-Type", "application/json")], listing.len())?;
            return stream.write_all(listing.as_bytes());
        }
        let resolve = format!("/{}/resolve/{COMMIT}/", self.repository);
        let cache = format!("/api/resolve-cache/{COMMIT}/");
        let file = [resolve.as_str(), cache.as_str(), "/blobs/"].iter().find_map(|at| path.strip_prefix(at));
        let files = self.files.lock().unwrap();
        let Some((file, bytes)) = file.and_then(|file| Some((file.to_owned(), files.get(file)?.clone())))
        else {
            return head(&mut stream, "404 Not Found", &[], 0);
        };
        drop(files);
        let mut hash = hash(&file, &bytes);
        if faults.other_tag.contains(&file) {
            hash = FileHash::Sha256([7; 32]);
        }
        let tag = format!("\"{}\"", hash.hex());
        if path.starts_with(&resolve) {
            let to = if is_large(&file) {
                format!("{}/blobs/{file}?Signature=secret", self.far)
            } else {
                format!("{cache}{file}")
            };
            let linked = ("X-Linked-Etag", tag.as_str());
            let heads = [("X-Repo-Commit", commit.as_str()), ("Location", &to), linked];
            let heads = if is_large(&file) { &heads[..] } else { &heads[..2] };
            return head(&mut stream, "302 Found", heads, 0);
        }
        // Where large files lie, tags mean something else.
        let tag = if far { format!("\"{}\"", "ab".repeat(32)) } else { tag };
        give(&mut stream, &mut faults, &file, bytes, &asked, &tag)
    }

    fn listing(&self, faults: &Faults) -> serde_json::Value {
        let files = self.files.lock().unwrap();
        let siblings: Vec<_> = files
            .iter()
            .map(|(path, bytes)| {
                let len = faults.told_len.get(path).copied().unwrap_or(bytes.len() as u64);
                let hex = hash(path, bytes).hex();
                if is_large(path) {
                    let lfs = json!({ "sha256": hex, "size": len, "pointerSize": 134 });
                    json!({ "rfilename": path, "size": len, "blobId": "0".repeat(40), "lfs": lfs })
                } else {
                    json!({ "rfilename": path, "size": len, "blobId": hex })
                }
            })
            .collect();
        let gated = if faults.token.is_some() { json!("auto") } else { json!(false) };
        json!({ "id": self.repository, "sha": COMMIT, "gated": gated, "siblings": siblings, "tags": ["video"] })
    }
}

fn give(
    stream: &mut TcpStream,
    faults: &mut Faults,
    file: &str,
    mut bytes: Vec<u8>,
    asked: &Asked,
    tag: &str,
) -> std::io::Result<()> {
    if faults.wrong.iter().any(|wrong| wrong == file) {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
    }
    if faults.longer.iter().any(|longer| longer == file) {
        bytes.push(0);
    }
    let from = asked.range.filter(|_| !faults.no_ranges).unwrap_or(0) as usize;
    let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
    let heads = [("ETag", tag), ("Content-Range", range.as_str())];
    let (status, heads) =
        if from > 0 { ("206 Partial Content", &heads[..]) } else { ("200 OK", &heads[..1]) };
    let rest = &bytes[from..];
    head(stream, status, heads, rest.len())?;
    let cut = faults.cuts.iter().position(|(cut, _)| cut == file).map(|at| faults.cuts.remove(at).1);
    stream.write_all(&rest[..cut.unwrap_or(rest.len())])
}

fn head(stream: &mut TcpStream, status: &str, heads: &[(&str, &str)], len: usize) -> std::io::Result<()> {
    let mut text = format!("HTTP/1.1 {status}\r\nContent-Length: {len}\r\nConnection: close\r\n");
    for (name, value) in heads {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str("\r\n");
    stream.write_all(text.as_bytes())
}

pub(crate) fn is_large(path: &str) -> bool {
    path.ends_with(".safetensors") || path.ends_with(".model")
}

fn hash(path: &str, bytes: &[u8]) -> FileHash {
    let kind = if is_large(path) { FileHash::Sha256([0; 32]) } else { FileHash::Git([0; 20]) };
    let mut hashing = Hashing::like(&kind, bytes.len() as u64);
    hashing.update(bytes);
    hashing.finish()
}

fn listen() -> TcpListener {
    TcpListener::bind(("127.0.0.1", 0)).unwrap()
}

fn walk(folder: &Path, under: &str, files: &mut BTreeMap<String, Vec<u8>>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() {
            walk(&path, &format!("{under}{name}/"), files);
        } else {
            files.insert(format!("{under}{name}"), fs::read(&path).unwrap());
        }
    }
}
