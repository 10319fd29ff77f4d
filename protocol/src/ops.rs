//! The operations that this release knows by name: what [`crate::JobSpec::ops`] may hold, in one table.
//!
//! A node refuses a job with an operation that it does not know, and one whose value is of another kind than the table
//! says. What a given model can do with a value, the node checks when the order comes, and its worker once more.

use crate::job::{JobSpec, OpValue};
use crate::units::Micro;

/// What sort of value an operation takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpKind {
    /// Yes or no.
    Flag,
    /// A whole number.
    Whole,
    /// A number.
    Number,
    /// One or several numbers.
    Numbers,
    /// One or several whole numbers.
    Wholes,
    /// A text.
    Text,
}

impl OpKind {
    /// What it is called.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Flag => "true or false",
            Self::Whole => "a whole number",
            Self::Number => "a number",
            Self::Numbers => "numbers",
            Self::Wholes => "whole numbers",
            Self::Text => "a text",
        }
    }

    /// Whether a value is of this sort.
    #[must_use]
    pub fn takes(self, value: &OpValue) -> bool {
        match (self, value) {
            (Self::Flag, OpValue::Flag(_))
            | (Self::Whole | Self::Number | Self::Numbers | Self::Wholes, OpValue::Whole(_))
            | (Self::Number | Self::Numbers, OpValue::Number(_))
            | (Self::Text, OpValue::Text(_)) => true,
            (Self::Numbers, OpValue::Numbers(numbers)) => !numbers.is_empty(),
            (Self::Wholes, OpValue::Numbers(numbers)) => !numbers.is_empty() && numbers.iter().all(is_whole),
            _ => false,
        }
    }
}

fn is_whole(number: &Micro) -> bool {
    number.0 % Micro::ONE.0 == 0
}

/// An operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpInfo {
    /// Its name on the wire.
    pub name: &'static str,
    /// What it takes.
    pub kind: OpKind,
    /// What it does, for artists.
    pub help: &'static str,
}

const fn op(name: &'static str, kind: OpKind, help: &'static str) -> OpInfo {
    OpInfo { name, kind, help }
}

/// Every operation, in the order in which people are told of them.
pub const OPS: &[OpInfo] = &[
    op(
        "timesteps",
        OpKind::Numbers,
        "the model's own timesteps, falling, as many as steps; for distilled models",
    ),
    op(
        "guidance.curve",
        OpKind::Numbers,
        "guidance from the first step to the last: points evenly spread, lines between them; one for each step if there \
         are as many. Below 1 is meant: 0 is the negative prompt alone, less flees the prompt",
    ),
    op(
        "prompt.mix",
        OpKind::Text,
        "a second prompt, mixed into the embeddings of the first; one longer than 512 bytes is several in a row",
    ),
    op(
        "prompt.weight",
        OpKind::Number,
        "0 is the first prompt, 1 the second, anything else between them or beyond [0.5]",
    ),
    op("prompt.spherical", OpKind::Flag, "mix prompts along an arc instead of a line"),
    op("noise.mix", OpKind::Whole, "a second seed, whose noise is mixed into that of the first"),
    op(
        "noise.weight",
        OpKind::Number,
        "0 is the first seed, 1 the second, anything else between them or beyond [0.5]",
    ),
    op(
        "noise.linear",
        OpKind::Flag,
        "mix noise on a line instead of an arc: it gets weaker between the ends",
    ),
    op("layers.skip", OpKind::Wholes, "blocks of the transformer to leave out, counted from 0"),
    op(
        "layers.repeat",
        OpKind::Wholes,
        "blocks to compute once more right after themselves, for each time they are named",
    ),
    op(
        "channels.permute",
        OpKind::Wholes,
        "for each channel of the latents, from 0, the one that it becomes; one may be named twice",
    ),
    op("channels.scale", OpKind::Numbers, "factors of the latents' channels: one for all, or one each"),
    op(
        "channels.shift",
        OpKind::Numbers,
        "what is added to the latents' channels: one number for all, or one each",
    ),
    op(
        "channels.after",
        OpKind::Whole,
        "after how many steps channels are permuted, scaled and shifted, in this order; 0 is the noise [before the decode]",
    ),
    op("latents.return_noise", OpKind::Flag, "give back the initial noise beside the final latents"),
    op(
        "latents.return_steps",
        OpKind::Wholes,
        "give back the latents after these steps too, with what the sampler remembers then",
    ),
    op(
        "latents.start_step",
        OpKind::Whole,
        "the given latents are those after so many steps: go on from there; bit for bit, if the file is of such a job",
    ),
    op(
        "denoise_strength",
        OpKind::Number,
        "the given latents are final ones: put noise over them and run this last part of the steps, above 0 to 1",
    ),
    op("decode_only", OpKind::Flag, "compute no step: the given latents go through the VAE alone"),
    op(
        "upsample_adain",
        OpKind::Number,
        "how far latents that were made larger get back each channel's mean and spread",
    ),
    op("upsample_tone_map", OpKind::Number, "how far large values of theirs are pulled in"),
    op(
        "extend_frames",
        OpKind::Whole,
        "how many of the former clip's last frames a clip begins with that goes on from one",
    ),
    op("picture_noise_scale", OpKind::Number, "how much noise is put on given pictures at each step"),
    op("truncate_prompt", OpKind::Flag, "cut a prompt that is too long instead of refusing it"),
    op("decode_timestep", OpKind::Number, "the noise level that a timestep-conditioned decoder is told"),
    op("decode_noise_scale", OpKind::Number, "how much noise such a decoder's input gets"),
    op("decode_tile", OpKind::Whole, "decode in tiles of about so many pixels, to save memory"),
    op("decode_chunk", OpKind::Whole, "decode in runs of about so many frames, to save memory"),
];

/// The operation of this name.
#[must_use]
pub fn find(name: &str) -> Option<&'static OpInfo> {
    OPS.iter().find(|op| op.name == name)
}

/// Whether by this operation a run does not go from noise through steps that follow from each other, so that no single
/// step of it can be looked at.
#[must_use]
pub fn reaches_in(name: &str, value: &OpValue) -> bool {
    match name {
        "decode_only" => *value != OpValue::Flag(false),
        "latents.start_step" | "denoise_strength" => true,
        "channels.after" => *value != OpValue::Whole(0),
        _ => false,
    }
}

/// The first such operation of a job.
#[must_use]
pub fn reaching_in(spec: &JobSpec) -> Option<&'static str> {
    let found = spec.ops.iter().find(|op| reaches_in(op.name.as_str(), &op.value))?;
    find(found.name.as_str()).map(|op| op.name)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::codec::{List, Text};

    #[test]
    fn every_operation_has_a_name_of_its_own_and_says_what_it_does() {
        for (index, op) in OPS.iter().enumerate() {
            assert_eq!(find(op.name).map(|found| found.help), Some(op.help));
            assert!(OPS[..index].iter().all(|other| other.name != op.name), "{} stands twice", op.name);
            assert!(op.help.len() > 20 && !op.help.contains('|'), "{}", op.name);
        }
        assert!(find("latents.eat").is_none());
    }

    #[test]
    fn a_value_of_another_sort_is_none() {
        let numbers = |values: &[i64]| OpValue::Numbers(List::first_of(values.iter().map(|v| Micro(*v))));
        let text = OpValue::Text(Text::truncated("a"));
        assert!(OpKind::Wholes.takes(&numbers(&[2_000_000, 0])) && OpKind::Wholes.takes(&OpValue::Whole(3)));
        assert!(!OpKind::Wholes.takes(&numbers(&[2_500_000])) && !OpKind::Wholes.takes(&numbers(&[])));
        assert!(OpKind::Numbers.takes(&numbers(&[2_500_000])) && OpKind::Number.takes(&OpValue::Whole(-1)));
        assert!(!OpKind::Whole.takes(&OpValue::Number(Micro(1_500_000))) && !OpKind::Flag.takes(&text));
        assert!(OpKind::Text.takes(&text) && !OpKind::Text.takes(&OpValue::Flag(true)));
    }
}
