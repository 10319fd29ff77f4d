//! Which architectures there are, and how a model folder finds its own: by the class that `model_index.json` names.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::Error;
use crate::facts::{Facts, INDEX_FILE};
use crate::models;
use crate::pipeline::run::check_sizes;
use crate::pipeline::{GenerateRequest, LoadOptions, Pipeline, config_error, read_json};
use crate::plan::{MemoryPlan, PlanOptions};

/// Reads a model folder whose index is read already.
pub type Loader = fn(&Path, &ModelIndex, &LoadOptions) -> Result<Box<dyn Pipeline>, Error>;

/// Says what a model folder is, whose index is read already, without reading its weights.
pub type Teller = fn(&Path, &ModelIndex) -> Result<Facts, Error>;

/// Says what a request needs in memory with a model folder whose index is read already.
pub type Planner = fn(&Path, &ModelIndex, &GenerateRequest, &PlanOptions) -> Result<MemoryPlan, Error>;

/// In which pieces a decode has the very pixels of the whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exact {
    /// In tiles.
    pub tiles: bool,
    /// In runs of frames.
    pub runs: bool,
}

/// An architecture that can be loaded.
pub struct Architecture {
    /// Its name, as in [`crate::PipelineInfo::architecture`].
    pub name: &'static str,
    /// The pipeline classes that `model_index.json` may name.
    pub classes: &'static [&'static str],
    /// What a folder says of itself: everything that others need to know about a model of this architecture.
    pub facts: Teller,
    /// What a request needs in memory.
    pub plan: Planner,
    /// Whether a decode in tiles, and one in runs of frames, has the very pixels of the whole.
    pub exact: Exact,
    /// Reads a folder.
    pub load: Loader,
}

/// Every architecture. A further model is a folder under `models` and a line here.
pub const ARCHITECTURES: &[Architecture] = &[
    models::ltx::ARCHITECTURE,
    models::cogvideox::ARCHITECTURE,
    models::mochi::ARCHITECTURE,
    models::pyramid::ARCHITECTURE,
    models::wan::ARCHITECTURE,
];

/// `model_index.json`: the pipeline's class and each component's library and class.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelIndex {
    /// The pipeline's class.
    pub class: String,
    fields: Map<String, Value>,
}

impl ModelIndex {
    /// Reads a folder's index. Pyramid Flow is published without one: there the transformer's class is the pipeline's. So
    /// are single files of LTX-Video.
    ///
    /// # Errors
    /// When it is not there, is not JSON, or names no class.
    pub fn read(folder: &Path) -> Result<Self, Error> {
        let file = folder.join(INDEX_FILE);
        if !file.exists()
            && let Some(class) = implied_class(folder)?
        {
            return Ok(Self { class, fields: Map::new() });
        }
        let fields: Map<String, Value> = read_json(&file)?;
        let class = fields.get("_class_name").and_then(Value::as_str).map(str::to_owned);
        let class = class
            .ok_or_else(|| config_error(&file, "_class_name", "missing", "no pipeline class is named"))?;
        Ok(Self { class, fields })
    }

    /// The class of a component, where the index names one.
    #[must_use]
    pub fn component(&self, name: &str) -> Option<&str> {
        self.fields.get(name)?.get(1)?.as_str()
    }

    /// A setting of the pipeline itself that is true or false, where the index holds one.
    ///
    /// # Errors
    /// Any other value.
    pub fn flag(&self, folder: &Path, name: &str) -> Result<Option<bool>, Error> {
        match self.fields.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(on)) => Ok(Some(*on)),
            Some(other) => {
                let file = folder.join(INDEX_FILE);
                Err(config_error(file, name, other, "it must be true or false"))
            }
        }
    }

    /// A value that is no component, where the index has it and it is not null.
    #[must_use]
    pub fn value(&self, name: &str) -> Option<&Value> {
        self.fields.get(name).filter(|value| !value.is_null())
    }

    /// Checks that a component, where it is named, has one of the known classes.
    ///
    /// # Errors
    /// Another class, by its name.
    pub fn expect(&self, folder: &Path, component: &str, known: &[&str]) -> Result<(), Error> {
        match self.component(component) {
            Some(class) if !known.contains(&class) => {
                let reason = format!("known are {}", known.join(", "));
                Err(config_error(folder.join(INDEX_FILE), component, class, reason))
            }
            _ => Ok(()),
        }
    }
}

/// Loads a model folder in the published diffusers layout.
///
/// # Errors
/// An unknown architecture, a configuration value that is not known, a missing or broken weight file, or a device
/// without room; each names the file and what is wrong with it.
pub fn load(folder: &Path, options: &LoadOptions) -> Result<Box<dyn Pipeline>, Error> {
    let (architecture, index) = find(folder)?;
    let options = LoadOptions { places: options.places.fresh(), ..options.clone() };
    let pipeline = (architecture.load)(folder, &index, &options);
    options.places.check(pipeline.is_ok())?;
    pipeline
}

/// What a model folder says of itself, from its configuration files alone.
///
/// # Errors
/// As [`load`], as far as it can be known without weights.
pub fn facts(folder: &Path) -> Result<Facts, Error> {
    let (architecture, index) = find(folder)?;
    (architecture.facts)(folder, &index)
}

/// What a request needs in memory with a model folder, from its configuration files alone.
///
/// # Errors
/// As [`facts`], or what the request cannot be.
pub fn plan(folder: &Path, request: &GenerateRequest, options: &PlanOptions) -> Result<MemoryPlan, Error> {
    // What goes through frames and tiles one by one has an end, whatever is asked for.
    const MOST_FRAMES: usize = 1 << 20;
    const MOST_PIXELS: usize = 1 << 16;
    let (architecture, index) = find(folder)?;
    if request.frames > MOST_FRAMES {
        let (given, rule) = (request.frames as f64, "no plan is made for more than 1048576");
        return Err(Error::Number { field: "frames", given, rule });
    }
    for (field, side) in [("width", request.width), ("height", request.height)] {
        if side > MOST_PIXELS {
            return Err(Error::Number {
                field,
                given: side as f64,
                rule: "no plan is made for more than 65536",
            });
        }
    }
    check_sizes(&(architecture.facts)(folder, &index)?.info, request)?;
    (architecture.plan)(folder, &index, request, options)
}

/// In which pieces a decode of a model folder's clips has the very pixels of the whole.
///
/// # Errors
/// As [`facts`].
pub fn exact(folder: &Path) -> Result<Exact, Error> {
    Ok(find(folder)?.0.exact)
}

/// The class of a folder without an index, of which a family knows it.
fn implied_class(folder: &Path) -> Result<Option<String>, Error> {
    match models::pyramid::implied_class(folder) {
        Some(class) => Ok(Some(class)),
        None => models::ltx::implied_class(folder),
    }
}

fn find(folder: &Path) -> Result<(&'static Architecture, ModelIndex), Error> {
    let index = ModelIndex::read(folder)?;
    let found =
        ARCHITECTURES.iter().find(|architecture| architecture.classes.contains(&index.class.as_str()));
    let architecture = found.ok_or_else(|| Error::UnknownArchitecture {
        class: index.class.clone(),
        file: folder.join(INDEX_FILE),
        known: ARCHITECTURES.iter().flat_map(|a| a.classes).copied().collect::<Vec<_>>().join(", "),
    })?;
    Ok((architecture, index))
}
