//! `manifest.json` and the files that it names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kinoflock_inference::registry::ModelIndex;
use kinoflock_inference::{DType, Device, Tensor};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::report::{Report, Row};

/// A golden with its file read.
pub(crate) struct Case {
    /// Its name in the manifest.
    pub(crate) name: String,
    /// How the reference was called.
    pub(crate) params: Map<String, Value>,
    /// Everything in its file.
    pub(crate) tensors: BTreeMap<String, Tensor>,
    /// The folder's `pipeline`, or the one that the golden names.
    pub(crate) pipeline: PathBuf,
    facts: BTreeMap<String, Facts>,
    arch: Option<String>,
}

/// What this engine computed: a golden tensor's name, a label where one tensor is computed in several ways, the values.
pub(crate) type Outputs = Vec<(String, &'static str, Tensor)>;

#[derive(Deserialize)]
struct Manifest {
    #[serde(default)]
    arch: Option<String>,
    goldens: BTreeMap<String, Golden>,
}

#[derive(Deserialize)]
struct Golden {
    file: String,
    /// Another folder than `pipeline`, for goldens that share one.
    #[serde(default)]
    pipeline: Option<String>,
    #[serde(default)]
    params: Option<Map<String, Value>>,
    #[serde(default)]
    tensors: BTreeMap<String, Facts>,
}

#[derive(Deserialize)]
struct Facts {
    #[serde(default)]
    atol: Option<f64>,
    #[serde(default)]
    shape: Option<Vec<usize>>,
}

/// A golden, or its name and why it cannot be read.
pub(crate) type ReadCase = Result<Case, (String, String)>;

/// Every golden of a folder; one whose file cannot be read is an error with its name.
pub(crate) fn read_manifest(folder: &Path) -> Result<Vec<ReadCase>, String> {
    let text = std::fs::read_to_string(folder.join("manifest.json")).map_err(|error| error.to_string())?;
    let manifest: Manifest = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    Ok(manifest
        .goldens
        .into_iter()
        .map(|(name, golden)| {
            let file = folder.join(&golden.file);
            let tensors = candle_core::safetensors::load(&file, &Device::Cpu);
            let tensors = tensors.map_err(|error| (name.clone(), format!("{}: {error}", file.display())))?;
            Ok(Case {
                name,
                params: golden.params.unwrap_or_default(),
                tensors: tensors.into_iter().collect(),
                pipeline: folder.join(golden.pipeline.as_deref().unwrap_or("pipeline")),
                facts: golden.tensors,
                arch: manifest.arch.clone(),
            })
        })
        .collect())
}

impl Case {
    /// The pipeline's class, or the manifest's `arch` where the folder has no index.
    pub(crate) fn model(&self) -> Result<String, String> {
        let index = self.pipeline.join("model_index.json");
        if index.exists() {
            return Ok(ModelIndex::read(&self.pipeline).map_err(|error| error.to_string())?.class);
        }
        self.arch
            .clone()
            .ok_or_else(|| format!("{} is missing and the manifest has no arch", index.display()))
    }

    /// An input.
    pub(crate) fn input(&self, name: &str) -> Result<&Tensor, String> {
        self.tensors.get(name).ok_or_else(|| format!("{name} is missing in the golden's file"))
    }

    /// A parameter in some form.
    pub(crate) fn param<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<T, String> {
        let value =
            self.params.get(name).ok_or_else(|| format!("parameter {name} is missing in the manifest"))?;
        serde_json::from_value(value.clone()).map_err(|error| format!("parameter {name}: {error}"))
    }

    /// A parameter that may be missing or null.
    pub(crate) fn maybe<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<Option<T>, String> {
        match self.params.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(_) => self.param(name).map(Some),
        }
    }

    /// Tensors whose name is a prefix and a number, in the number's order.
    pub(crate) fn numbered(&self, prefix: &str) -> Vec<Tensor> {
        let mut found: Vec<(usize, Tensor)> = self
            .tensors
            .iter()
            .filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?.parse().ok()?, tensor.clone())))
            .collect();
        found.sort_by_key(|(number, _)| *number);
        found.into_iter().map(|(_, tensor)| tensor).collect()
    }

    /// Names of everything that the reference computed, whether the manifest or the file tells of it.
    pub(crate) fn wanted(&self) -> Vec<String> {
        let names = self
            .facts
            .keys()
            .chain(self.tensors.keys())
            .filter(|name| name.starts_with("out.") || name.starts_with("f64."));
        names.cloned().collect::<std::collections::BTreeSet<_>>().into_iter().collect()
    }

    /// A row for every golden tensor, once for each way in which it was computed.
    pub(crate) fn compare(&self, outputs: &Outputs, report: &mut Report) {
        let wanted = self.wanted();
        if wanted.is_empty() {
            report.push(Row::not_compared(&self.name, "", "it holds no result".to_owned()));
        }
        for name in wanted {
            let mut found = outputs.iter().filter(|(output, _, _)| *output == name).peekable();
            if found.peek().is_none() {
                report.push(Row::not_compared(
                    &self.name,
                    &name,
                    "this engine has no such result".to_owned(),
                ));
            }
            for (_, label, values) in found {
                let title = if label.is_empty() { name.clone() } else { format!("{name} ({label})") };
                report.push(match self.difference(&name, values) {
                    Ok((difference, tolerance)) => Row::compared(&self.name, &title, difference, tolerance),
                    Err(reason) => Row::not_compared(&self.name, &title, reason),
                });
            }
        }
    }

    /// A failing row for every golden tensor.
    pub(crate) fn fail_all(&self, reason: &str, report: &mut Report) {
        let wanted = self.wanted();
        if wanted.is_empty() {
            report.push(Row::not_compared(&self.name, "", reason.to_owned()));
        }
        for name in wanted {
            report.push(Row::not_compared(&self.name, &name, reason.to_owned()));
        }
    }

    /// The largest absolute difference and the tolerance: the manifest's for floats, 0 for whole numbers.
    fn difference(&self, name: &str, values: &Tensor) -> Result<(f64, f64), String> {
        let golden = self.input(name)?;
        let facts = self.facts.get(name).ok_or("the manifest does not tell of it")?;
        if facts.shape.as_ref().is_some_and(|shape| shape != golden.dims()) {
            return Err(format!(
                "the file has shape {:?}, the manifest says {:?}",
                golden.dims(),
                facts.shape
            ));
        }
        if golden.dims() != values.dims() {
            return Err(format!("shape {:?}, the golden has {:?}", values.dims(), golden.dims()));
        }
        let whole = !golden.dtype().is_float();
        let tolerance = match facts.atol {
            Some(atol) => atol,
            None if whole => 0.0,
            None => return Err("the manifest has no tolerance for it".to_owned()),
        };
        let (ours, theirs) = (numbers(values)?, numbers(golden)?);
        let difference = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs());
        let worst =
            difference.fold(0.0, |worst: f64, d| if d.is_nan() { f64::INFINITY } else { worst.max(d) });
        Ok((worst, tolerance))
    }
}

fn numbers(tensor: &Tensor) -> Result<Vec<f64>, String> {
    let flat = tensor
        .flatten_all()
        .and_then(|flat| flat.to_dtype(DType::F64))
        .and_then(|flat| flat.to_vec1::<f64>());
    flat.map_err(|error| error.to_string())
}
