//! A step's prediction with guidance: from the texts as one batch, or from one after the other.
//!
//! What a model reads of the texts is held once, in the form in which its predictions begin: joined, or each for itself.
//! Where the device has no room for the joined ones, their entries are looked at one by one.

use candle_core::{Result, Tensor};

use super::GenerateRequest;
use super::touch::Embeds;
use crate::error::Error;
use crate::sampler::guidance::{Passes, guide, rescale};

/// What a model reads of a batch of texts.
pub(crate) trait Entries: Sized {
    /// One of them alone, without a copy of what is large.
    fn entry(&self, index: usize) -> Result<Self>;
}

impl Entries for Tensor {
    fn entry(&self, index: usize) -> Result<Self> {
        self.narrow(0, index, 1)
    }
}

impl<A: Entries, B: Entries> Entries for (A, B) {
    fn entry(&self, index: usize) -> Result<Self> {
        Ok((self.0.entry(index)?, self.1.entry(index)?))
    }
}

impl<T: Entries> Entries for Option<T> {
    fn entry(&self, index: usize) -> Result<Self> {
        self.as_ref().map(|some| some.entry(index)).transpose()
    }
}

/// A run's texts as the model reads them.
pub(crate) struct Texts<T> {
    form: Form<T>,
    passes: Passes,
}

enum Form<T> {
    /// Without guidance.
    Positive(T),
    /// Negative and positive as one batch.
    Joined(T),
    /// Negative and positive.
    Each([T; 2]),
}

impl<T: Entries> Texts<T> {
    /// Of the embedded prompt, and with guidance of the negative one; `context` is what the model reads of some.
    pub(crate) fn new<E: Embeds>(
        passes: &Passes,
        positive: &E,
        negative: Option<&E>,
        context: impl Fn(&E) -> std::result::Result<T, Error>,
    ) -> std::result::Result<Self, Error> {
        let form = match negative {
            None => Form::Positive(context(positive)?),
            Some(negative) if passes.is_together() => Form::Joined(context(&negative.joined(positive)?)?),
            Some(negative) => Form::Each([context(negative)?, context(positive)?]),
        };
        Ok(Self { form, passes: passes.clone() })
    }

    /// The prediction from the prompt and, with guidance, the one from the negative prompt: `predict` is given texts and
    /// how many they are.
    pub(crate) fn predict(
        &self,
        predict: impl Fn(&T, usize) -> std::result::Result<Tensor, Error>,
    ) -> std::result::Result<(Tensor, Option<Tensor>), Error> {
        let [negative, positive] = match &self.form {
            Form::Positive(text) => return Ok((predict(text, 1)?, None)),
            Form::Joined(both) => {
                self.passes.predict(|| predict(both, 2), |index| predict(&both.entry(index)?, 1))?
            }
            Form::Each(texts) => [predict(&texts[0], 1)?, predict(&texts[1], 1)?],
        };
        Ok((positive, Some(negative)))
    }

    /// The guided prediction at step `index` of so many, where the request's guidance is `plain` if no curve says
    /// otherwise.
    pub(crate) fn guided(
        &self,
        request: &GenerateRequest,
        (index, steps): (usize, usize),
        plain: f64,
        predict: impl Fn(&T, usize) -> std::result::Result<Tensor, Error>,
    ) -> std::result::Result<Tensor, Error> {
        let (positive, negative) = self.predict(predict)?;
        let Some(negative) = negative else { return Ok(positive) };
        let guided = guide(&negative, &positive, request.guidance_at(index, steps, plain))?;
        if request.guidance_rescale > 0.0 {
            return Ok(rescale(&guided, &positive, request.guidance_rescale)?);
        }
        Ok(guided)
    }
}

/// `tensor`, whose first dimension is 1, for each of so many texts.
pub(crate) fn each(tensor: &Tensor, texts: usize) -> Result<Tensor> {
    Tensor::cat(&vec![tensor; texts], 0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::Path;

    use crate::sampler::guidance::GuidancePasses;
    use crate::sampler::guidance::simulated::FULL;
    use crate::{GenerateRequest, LoadOptions, Silent, load, registry};

    #[test]
    fn a_device_without_room_for_both_texts_computes_the_same_one_by_one() {
        let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
        for name in
            ["ltx-video-0.9.5", "cogvideox-2b", "mochi-1", "pyramid-flow-miniflux", "wan2.1", "wan2.2-a14b"]
        {
            let folder = goldens.join(name).join("pipeline");
            let mut request = registry::facts(&folder).unwrap().smallest();
            (request.prompt, request.negative_prompt) = ("a red dog".to_owned(), "cold fog".to_owned());
            (request.steps, request.guidance, request.truncate_prompt) = (2, 3.0, true);
            request.decode.skip = true;
            let mut pipeline = load(&folder, &LoadOptions::default()).unwrap();
            let mut run = |guidance_passes, full| {
                FULL.set(full);
                let request = GenerateRequest { guidance_passes, ..request.clone() };
                let made = pipeline.generate(&request, &mut Silent).unwrap();
                (made.step_hashes, FULL.take())
            };
            let (together, _) = run(GuidancePasses::Together, None);
            let (fallen_back, found) = run(GuidancePasses::Together, Some(0));
            assert_eq!(found, Some(1), "{name}: it is found out once");
            assert_eq!(together, fallen_back, "{name}");
            let (apart, found) = run(GuidancePasses::Apart, Some(0));
            assert_eq!((together, Some(0)), (apart, found), "{name}");
        }
    }
}
