//! What a model folder says of itself before its weights are read: which clips it can make, what it does where nobody
//! says otherwise, what a job costs with it, how it reads prompts, and which files it is made of.
//!
//! A family answers all of it in one function, [`crate::registry::Architecture::facts`], from configuration files alone.
//! Loading begins with the same function, so what a node promises and what it computes cannot differ.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::folder::{EXTRAS_FILE, Extras, TEXT_STEM, WEIGHTS_STEM};
use crate::pipeline::{Defaults, FrameRule, GenerateRequest, PipelineInfo, WorkConfig};
use crate::text::{Encoded, PromptTokenizer, T5Config, TextError};
use crate::weights;

/// The file that names the pipeline's class and its parts.
pub const INDEX_FILE: &str = "model_index.json";
/// Endings of the files of a part beside its weights: configurations and vocabularies.
const ENDINGS: &[&str] = &["json", "model", "txt"];

/// What a folder says.
#[derive(Debug, Clone)]
pub struct Facts {
    /// What [`crate::Pipeline::info`] says of the loaded model; the numbers of parameters are 0 here.
    pub info: PipelineInfo,
    /// What a job costs, beside what `info` says of it.
    pub figures: Figures,
    /// How prompts are counted.
    pub prompts: PromptRule,
    /// Where its files lie.
    pub parts: Vec<Part>,
    /// Whether it makes clips of the size of its defaults alone.
    pub one_size: bool,
}

/// From what, beside [`crate::WorkConfig`], a job's work follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Figures {
    /// How text takes part in the transformer.
    pub attention: Attention,
    /// How many of the transformer's blocks see text and video as one sequence with one set of weights, while the others
    /// do not.
    pub single_layers: usize,
    /// Matrices of a feed-forward: 2, or 3 if it is gated.
    pub feed_forward_matrices: usize,
    /// Width of a text token in the transformer.
    pub text_width: usize,
    /// Parameters of the text encoder that every token meets.
    pub text_parameters: u64,
    /// Channels and residual blocks at each resolution of the VAE's decoder, from the finest to the coarsest.
    pub decoder: Vec<(usize, usize)>,
    /// Pixels along a side of what the finest of them works on.
    pub vae_patch: usize,
    /// Whether a clip is made latent frame by latent frame in stages of growing size; then every stage has a job's steps.
    pub staged: bool,
}

impl Figures {
    /// Of a model with one stream of blocks, feed-forwards of two matrices, T5, and no stages.
    pub(crate) fn usual(
        attention: Attention,
        text_width: usize,
        text: &T5Config,
        decoder: Vec<(usize, usize)>,
    ) -> Self {
        Self {
            attention,
            single_layers: 0,
            feed_forward_matrices: 2,
            text_width,
            text_parameters: text.token_parameters(),
            decoder,
            vae_patch: 1,
            staged: false,
        }
    }
}

/// What most models say: clips of whole tokens, prompts as long as the work's context, and `usual` defaults unless the
/// folder has its own.
pub(crate) fn usual_info(
    folder: &Path,
    architecture: &str,
    work: WorkConfig,
    usual: Defaults,
) -> Result<PipelineInfo, Error> {
    Ok(PipelineInfo {
        architecture: architecture.to_owned(),
        size_multiple: work.spatial_ratio * work.patch[2],
        frame_rule: FrameRule::of_tokens(&work),
        defaults: Extras::read(folder, work.latent_channels)?.defaults.unwrap_or(usual),
        token_limit: work.context_tokens,
        work,
    })
}

/// How text takes part in a transformer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attention {
    /// Video attends to itself, then to the text.
    Cross,
    /// Text and video attend to each other, with weights of their own.
    Joint,
    /// Text and video attend to each other, with the same weights.
    Shared,
}

/// How a model reads prompts.
#[derive(Debug, Clone)]
pub struct PromptRule {
    /// The folder of the tokenizer whose limit counts.
    pub tokenizer: &'static str,
    /// What is done to a prompt first.
    pub clean: Option<fn(&str) -> String>,
    /// What is put behind a prompt, and not behind a negative one.
    pub suffix: String,
}

impl PromptRule {
    /// Prompts as they stand, by the usual tokenizer.
    #[must_use]
    pub fn plain() -> Self {
        Self { tokenizer: "tokenizer", clean: None, suffix: String::new() }
    }
}

/// A prompt's tokens as a model counts them, without the model.
pub struct PromptCounter {
    rule: PromptRule,
    tokenizer: PromptTokenizer,
}

impl PromptCounter {
    /// Reads a model's tokenizer.
    ///
    /// # Errors
    /// When there is none, or it cannot be read; both name the file.
    pub fn open(folder: &Path, rule: PromptRule) -> Result<Self, TextError> {
        Ok(Self { tokenizer: PromptTokenizer::load(&folder.join(rule.tokenizer))?, rule })
    }

    /// A prompt in `limit` tokens, and what of it is cut.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode(&self, prompt: &str, is_negative: bool, limit: usize) -> Result<Encoded, TextError> {
        let mut text = self.rule.clean.map_or_else(|| prompt.to_owned(), |clean| clean(prompt));
        if !is_negative {
            text.push_str(&self.rule.suffix);
        }
        self.tokenizer.encode(&text, limit)
    }
}

/// A folder within a model's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Its name.
    pub folder: String,
    /// The stem of its weight files, where it has weights.
    pub weights: Option<&'static str>,
    /// The one file that belongs to the model, where not all do that are of a known kind.
    only: Option<String>,
}

impl Part {
    /// Those of a text-to-video pipeline in the published diffusers layout.
    pub(crate) fn usual() -> Vec<Self> {
        vec![
            Self::with("transformer", WEIGHTS_STEM),
            Self::with("vae", WEIGHTS_STEM),
            Self::with("text_encoder", TEXT_STEM),
            Self::plain("tokenizer"),
            Self::plain("scheduler"),
        ]
    }

    /// Those that read the text.
    #[must_use]
    pub fn text() -> Vec<Self> {
        vec![Self::with("text_encoder", TEXT_STEM), Self::plain("tokenizer")]
    }

    /// With weights under this stem.
    pub(crate) fn with(folder: &str, stem: &'static str) -> Self {
        Self { folder: folder.to_owned(), weights: Some(stem), only: None }
    }

    /// Without weights.
    pub(crate) fn plain(folder: &str) -> Self {
        Self { folder: folder.to_owned(), weights: None, only: None }
    }

    /// A weight file in the model's folder itself.
    pub(crate) fn file(path: &Path) -> Self {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        Self { folder: String::new(), weights: None, only: name }
    }

    /// The paths of its files within a model's folder, with `/`.
    ///
    /// # Errors
    /// When the folder cannot be read or lacks its weights.
    pub fn names(&self, model: &Path) -> Result<Vec<String>, Error> {
        if let Some(only) = &self.only {
            return Ok(vec![only.clone()]);
        }
        let folder = model.join(&self.folder);
        let mut files: Vec<PathBuf> = Vec::new();
        let unreadable = |source| Error::Read { file: folder.clone(), source };
        for entry in std::fs::read_dir(&folder).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            let ending = path.extension().and_then(|ending| ending.to_str());
            if ending.is_some_and(|ending| ENDINGS.contains(&ending)) {
                files.push(path);
            }
        }
        if let Some(stem) = self.weights {
            files.extend(weights::find(&folder, stem, None)?);
        }
        // `is_file` follows links: download caches are full of them.
        let names = files.iter().filter(|path| path.is_file());
        let names = names.filter_map(|path| path.file_name()?.to_str());
        Ok(names.map(|name| format!("{}/{name}", self.folder)).collect())
    }
}

impl Facts {
    /// A request for the smallest clip of two latent frames; of the defaults' size, if the model makes no other.
    #[must_use]
    pub fn smallest(&self) -> GenerateRequest {
        let info = &self.info;
        let mut request = GenerateRequest::new("", &info.defaults);
        request.frames = info.frame_rule.offset + info.frame_rule.multiple;
        if !self.one_size {
            (request.width, request.height) = (info.size_multiple, info.size_multiple);
        }
        request
    }

    /// Whether all weights are there and whole, as far as their headers tell.
    ///
    /// # Errors
    /// When a file is missing, cut short or corrupt.
    pub fn check_weights(&self, folder: &Path) -> Result<(), Error> {
        for part in &self.parts {
            if let Some(stem) = part.weights {
                weights::check(&folder.join(&part.folder), stem, None)?;
            }
            if let Some(only) = &part.only {
                weights::check_file(&folder.join(only))?;
            }
        }
        Ok(())
    }

    /// The paths within the folder that the model is made of, sorted, with `/`: of each part the configurations and
    /// vocabularies, and those weights that are read; the index and `kinoflock.json` where they are there. Whatever else
    /// lies in the folder, such as a readme or the same weights in another form, is no part of the model.
    ///
    /// # Errors
    /// When a part cannot be read or lacks its weights.
    pub fn files(&self, folder: &Path) -> Result<BTreeSet<String>, Error> {
        let mut files: BTreeSet<String> = [INDEX_FILE, EXTRAS_FILE]
            .into_iter()
            .filter(|name| folder.join(name).is_file())
            .map(str::to_owned)
            .collect();
        for part in &self.parts {
            files.extend(part.names(folder)?);
        }
        Ok(files)
    }
}
