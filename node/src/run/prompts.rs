//! Whether a model reads a prompt whole: counted when the order comes, so that the artist hears of it at once and not
//! when the job's turn has come.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use kinoflock_inference::facts::PromptCounter;
use kinoflock_inference::{Error, registry};
use kinoflock_protocol::id::ModelId;
use kinoflock_protocol::job::JobSpec;
use kinoflock_protocol::refusal::{Reason, Refusal};
use kinoflock_protocol::units::Micro;

use crate::models::Model;

/// The rule's name, as it stands in a model's manifest.
const RULE: &str = "max_prompt_tokens";
/// Characters of what would be cut that a refusal repeats.
const MAX_QUOTE: usize = 160;

/// What a refusal calls the prompt that says what is not to be seen.
const NEGATIVE: &str = "negative prompt";

/// The tokenizers of this node's models.
#[derive(Default)]
pub(super) struct Prompts(BTreeMap<ModelId, PromptCounter>);

impl Prompts {
    /// Reads every model's tokenizer. Of a model whose tokenizer cannot be read the worker says so, in its self-test.
    pub(super) fn of(models: &BTreeMap<ModelId, Arc<Model>>) -> Self {
        let read = |model: &Arc<Model>| match counter(&model.dir) {
            Ok(counter) => Some((model.id, counter)),
            Err(error) => {
                tracing::warn!(model = %model.name, %error, "prompts for this model cannot be counted");
                None
            }
        };
        Self(models.values().filter_map(read).collect())
    }

    /// Checks a job's prompt, the second one that is mixed into it, and, where it is used, the negative prompt.
    pub(super) fn check(
        &self,
        model: &Model,
        spec: &JobSpec,
        second: Option<&str>,
        follows_curve: bool,
    ) -> Result<(), Box<Refusal>> {
        let Some(counter) = self.0.get(&model.id) else { return Ok(()) };
        let limit = model.manifest.rules.max_prompt_tokens;
        let guided = spec.guidance > Micro::ONE || follows_curve;
        let negative = guided.then_some((NEGATIVE, spec.negative_prompt.as_str()));
        let second = second.map(|second| ("prompt.mix", second));
        let all = [Some(("prompt", spec.prompt.as_str())), second, negative];
        for (what, text) in all.into_iter().flatten() {
            let encoded = counter
                .encode(text, what == NEGATIVE, limit as usize)
                .map_err(|error| Box::new(Refusal::new(Reason::Invalid, what).given(error)))?;
            if let Some(cut) = encoded.cut_text {
                return Err(Box::new(too_long(what, encoded.tokens, limit, &cut)));
            }
        }
        Ok(())
    }
}

fn counter(folder: &Path) -> Result<PromptCounter, Error> {
    Ok(PromptCounter::open(folder, registry::facts(folder)?.prompts)?)
}

fn too_long(what: &str, tokens: usize, limit: u32, cut: &str) -> Refusal {
    let cut = cut.trim();
    let quote: String = cut.chars().take(MAX_QUOTE).collect();
    let more = if quote.len() < cut.len() { "..." } else { "" };
    let advice = format!(
        "this would be cut: {quote:?}{more}; shorten the {what}, or have it cut with --set truncate_prompt=true"
    );
    Refusal::new(Reason::PromptTooLong, RULE)
        .limit(format_args!("{limit} tokens"), format_args!("a {what} of {tokens} tokens"))
        .advice(&advice)
}
