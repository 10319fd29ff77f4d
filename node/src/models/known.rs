//! The models that are known by name: where each is published, which of its files are needed, under which licence, and
//! what its makers say about its training data. The list itself is `known.toml` beside this file.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use kinoflock_inference::registry::ARCHITECTURES;
use kinoflock_protocol::card::{
    Author, Card, Consent, ConsentGiven, CreditShare, Licence, Source, Subject, TrainingData,
};
use kinoflock_protocol::codec::{List, Text};
use kinoflock_protocol::id::ModelId;
use kinoflock_protocol::limits::WHOLE_BPS;
use kinoflock_protocol::units::UnixMillis;
use serde::Deserialize;

/// Most names that are offered for one that is not known.
const NEAR: usize = 3;
/// How alike a name must be to be offered, from 0 to 1.
const ALIKE: f64 = 0.7;

static LIST: LazyLock<Known> =
    LazyLock::new(|| toml::from_str(include_str!("known.toml")).expect("invariant: the list is tested"));

/// The whole list.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Known {
    licence: BTreeMap<String, KnownLicence>,
    family: BTreeMap<String, Family>,
    model: Vec<KnownModel>,
}

/// A licence of the list.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownLicence {
    /// SPDX expression, or a name of its own.
    pub name: String,
    /// Where it can be read.
    pub url: String,
    /// In a few words.
    pub conditions: String,
    /// Whether copies may be passed on.
    pub redistribution: Redistribution,
    /// Whether whoever pulls must accept its terms.
    pub accept: bool,
}

/// Whether copies of a model may be passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Redistribution {
    /// An open licence.
    Yes,
    /// Under terms that go beyond naming the licence.
    Conditions,
    /// The licence does not say it plainly.
    Unclear,
}

impl Redistribution {
    /// In one word or two.
    #[must_use]
    pub const fn words(self) -> &'static str {
        match self {
            Self::Yes => "yes",
            Self::Conditions => "on terms",
            Self::Unclear => "unclear",
        }
    }
}

/// Models of one architecture by the same makers.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Family {
    /// Its name for people.
    pub title: String,
    /// Who made it.
    pub authors: String,
    /// Whether it is told what it was trained on.
    pub disclosed: bool,
    /// What is told, or the plain word `undisclosed`.
    pub training: String,
    /// Names of the data sets that are told.
    #[serde(default)]
    pub sources: Vec<String>,
}

/// What clips are made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Makes {
    /// From a prompt.
    Text,
    /// From an image.
    Image,
    /// From either.
    Both,
}

impl Makes {
    /// In one word.
    #[must_use]
    pub const fn words(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Image => "image",
            Self::Both => "both",
        }
    }
}

/// A model of the list.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownModel {
    /// The name by which it is pulled and then offered.
    pub name: String,
    family: String,
    /// What it makes clips from.
    pub makes: Makes,
    /// The pipeline's class in the published files.
    pub class: String,
    /// The repository on the hub.
    pub repository: String,
    /// A commit, or a branch that may move.
    pub revision: String,
    /// The folders that are needed.
    #[serde(default)]
    pub folders: Vec<String>,
    /// The file of transformer and VAE, where these are published in one; `folders` are then the others.
    pub checkpoint: Option<String>,
    licence: String,
    /// Billions of parameters in the transformer, if known.
    pub parameters: Option<f64>,
    /// Gigabytes of the needed files, rounded, if known.
    pub gigabytes: Option<f64>,
    /// SHA-256 of files in hex, those that are known.
    #[serde(default)]
    pub sha256: BTreeMap<String, String>,
}

/// The whole list.
#[must_use]
pub fn all() -> &'static Known {
    &LIST
}

/// A model by its name.
#[must_use]
pub fn find(name: &str) -> Option<&'static KnownModel> {
    LIST.model.iter().find(|model| model.name == name)
}

/// Whether this release computes a pipeline of this class.
#[must_use]
pub fn runs(class: &str) -> bool {
    ARCHITECTURES.iter().any(|architecture| architecture.classes.contains(&class))
}

/// Names that are like one that is not known, the likest first.
#[must_use]
pub fn near(name: &str) -> Vec<&'static str> {
    let mut near: Vec<_> = LIST
        .model
        .iter()
        .map(|model| (strsim::jaro_winkler(name, &model.name), model.name.as_str()))
        .filter(|(alike, _)| *alike > ALIKE)
        .collect();
    near.sort_by(|a, b| b.0.total_cmp(&a.0));
    near.into_iter().take(NEAR).map(|(_, name)| name).collect()
}

impl Known {
    /// Every family with its models, in the list's order.
    pub fn families(&self) -> impl Iterator<Item = (&Family, Vec<&KnownModel>)> {
        let mut keys: Vec<&str> = Vec::new();
        for model in &self.model {
            if !keys.contains(&model.family.as_str()) {
                keys.push(&model.family);
            }
        }
        keys.into_iter().map(|key| {
            let models = self.model.iter().filter(|model| model.family == key).collect();
            (&self.family[key], models)
        })
    }
}

impl KnownModel {
    /// Its family.
    #[must_use]
    pub fn family(&self) -> &'static Family {
        &LIST.family[&self.family]
    }

    /// Its licence.
    #[must_use]
    pub fn licence(&self) -> &'static KnownLicence {
        &LIST.licence[&self.licence]
    }

    /// Why this release cannot run it, if it cannot.
    #[must_use]
    pub fn hindrance(&self) -> Option<String> {
        (!runs(&self.class)).then(|| format!("this release does not compute its pipeline, {}", self.class))
    }

    /// What the list says of it, as a card about `model`.
    #[must_use]
    pub fn card(&self, model: ModelId, now: UnixMillis) -> Card {
        let (family, licence) = (self.family(), self.licence());
        let authors: Text<_> = Text::truncated(&family.authors);
        let source = |name: &String| Source {
            name: Text::truncated(name),
            url: Text::default(),
            licence: Text::default(),
            items: 0,
            dataset: None,
        };
        Card {
            subject: Subject::Model(model),
            name: Text::truncated(&self.name),
            summary: Text::truncated(&format!("{}, as published in {}.", family.title, self.repository)),
            version: 1,
            previous: None,
            issued_at: now,
            authors: List::first_of([Author {
                name: authors.clone(),
                key: None,
                role: Text::truncated("makers"),
                contact: Text::default(),
            }]),
            licence: Licence {
                name: Text::truncated(&licence.name),
                url: Text::truncated(&licence.url),
                conditions: Text::truncated(&licence.conditions),
            },
            training_data: TrainingData {
                disclosed: family.disclosed,
                statement: Text::truncated(&family.training),
                sources: List::first_of(family.sources.iter().map(source)),
            },
            consent: Consent { given: ConsentGiven::Unknown, statement: Text::default() },
            shares: List::first_of([CreditShare {
                name: authors,
                key: None,
                role: Text::truncated("makers"),
                bps: WHOLE_BPS,
            }]),
            upstreams: List::default(),
            fingerprint: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_list_holds_five_families_and_every_entry_is_whole() {
        let families: Vec<_> = all().families().map(|(family, _)| family.title.as_str()).collect();
        assert_eq!(families, ["CogVideoX", "Mochi 1", "Pyramid Flow", "Wan", "LTX-Video"]);
        let mut names = BTreeSet::new();
        for model in &all().model {
            assert!(super::super::is_name(&model.name), "{}", model.name);
            assert!(names.insert(&model.name), "{} stands twice", model.name);
            assert_eq!(model.repository.split('/').count(), 2, "{}", model.repository);
            assert!(!model.folders.is_empty(), "{}", model.name);
            let whole = model.folders.iter().any(|folder| folder == "vae" || folder == "causal_video_vae");
            assert_ne!(whole, model.checkpoint.is_some(), "{}", model.name);
            for (file, hash) in &model.sha256 {
                assert!(hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit()), "{file}: {hash}");
                let folder = file.split('/').next().unwrap_or_default();
                let needed = model.folders.iter().any(|name| name == folder)
                    || model.checkpoint.as_deref() == Some(file.as_str());
                assert!(needed, "{}: {file} is no file that is needed", model.name);
            }
            let card = model.card(ModelId::of(b"any"), UnixMillis(1));
            card.check().expect("card");
            let open = super::super::licence::is_open(&card.licence.name);
            assert_eq!(open, model.licence().redistribution == Redistribution::Yes, "{}", model.name);
            assert!(open || model.licence().accept, "{}: terms that nobody accepted", model.name);
            assert_eq!(card.licence.name.as_str(), model.licence().name);
            assert_eq!(card.training_data.disclosed, model.family().training != "undisclosed");
        }
    }

    #[test]
    fn a_mistyped_name_is_answered_with_the_one_that_was_meant() {
        assert_eq!(near("wan2.1-t2v-1.3")[0], "wan2.1-t2v-1.3b");
        assert_eq!(near("cogvideo-2b")[0], "cogvideox-2b");
        assert!(near("a paper boat").is_empty());
    }
}
