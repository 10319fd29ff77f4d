//! Which files hold a component's weights, by the published names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{WeightsError, gguf, pickle};

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The weight files of a folder, in order.
///
/// # Errors
/// When there are none, or an index names one that is not there.
pub fn find(folder: &Path, stem: &str, variant: Option<&str>) -> Result<Vec<PathBuf>, WeightsError> {
    let usual = ["", "bf16", "fp16"];
    let infixes = variant.into_iter().chain(usual.into_iter().filter(|&infix| variant != Some(infix)));
    let mut looked_for = Vec::new();
    for infix in infixes {
        let dotted = if infix.is_empty() { String::new() } else { format!(".{infix}") };
        let single = format!("{stem}{dotted}.safetensors");
        let index = format!("{stem}.safetensors.index{dotted}.json");
        if folder.join(&single).exists() {
            return Ok(vec![folder.join(single)]);
        }
        if folder.join(&index).exists() {
            return shards(&folder.join(index));
        }
        looked_for.extend([single, index]);
    }
    let pickled = format!("{stem}.{}", pickle::EXTENSION);
    if folder.join(&pickled).exists() {
        return Ok(vec![folder.join(pickled)]);
    }
    looked_for.push(pickled);
    for ending in [gguf::EXTENSION, "safetensors"] {
        if let Some(file) = only(folder, ending, Some(stem))? {
            return Ok(vec![file]);
        }
        looked_for.push(format!("*.{ending}"));
    }
    Err(WeightsError::NotFound { folder: folder.to_owned(), looked_for: looked_for.join(", ") })
}

/// The folder's file that ends so, where there is one. One that begins with `stem` is another variant, or a shard that is
/// left of several: it is not taken for the whole.
pub(crate) fn only(folder: &Path, ending: &str, stem: Option<&str>) -> Result<Option<PathBuf>, WeightsError> {
    const SHOWN: usize = 3;
    let Ok(entries) = std::fs::read_dir(folder) else { return Ok(None) };
    let is_whole = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        !stem.and_then(|stem| name.strip_prefix(stem)).is_some_and(|rest| rest.starts_with(['.', '-']))
    };
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(is_whole)
        .filter(|path| path.extension().is_some_and(|found| found == ending) && path.is_file())
        .collect();
    files.sort();
    if files.len() < 2 {
        return Ok(files.pop());
    }
    let names = files.iter().take(SHOWN).filter_map(|file| Some(file.file_name()?.to_string_lossy()));
    let found = names.collect::<Vec<_>>().join(", ");
    Err(WeightsError::Several { folder: folder.to_owned(), found })
}

fn shards(file: &Path) -> Result<Vec<PathBuf>, WeightsError> {
    let fault = |reason: String| WeightsError::Index { file: file.to_owned(), reason };
    let text = std::fs::read_to_string(file).map_err(|error| fault(error.to_string()))?;
    let index: Index = serde_json::from_str(&text).map_err(|error| fault(error.to_string()))?;
    let names: std::collections::BTreeSet<String> = index.weight_map.into_values().collect();
    if names.is_empty() {
        return Err(fault("it names no file".to_owned()));
    }
    let folder = file.parent().unwrap_or(Path::new(""));
    names
        .into_iter()
        .map(|name| {
            if name.contains(['/', '\\']) || name.starts_with("..") {
                return Err(fault(format!("{name:?} is not a plain file name")));
            }
            let shard = folder.join(name);
            if shard.exists() {
                Ok(shard)
            } else {
                Err(WeightsError::MissingShard { file: shard, index: file.to_owned() })
            }
        })
        .collect()
}
