//! The flags of `generate` for what happens inside a run; each stands for an operation of the job.

use clap::Args;
use kinoflock_protocol::Micro;
use kinoflock_protocol::codec::{List, Text, TooLong};
use kinoflock_protocol::job::OpValue;
use kinoflock_protocol::limits::MAX_LINE;

use super::args::number;
use super::failure::Failure;

/// What happens inside the run. `kinoflock ops` tells more of each.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Latent space, open (numbers are not kept within sensible bounds)")]
pub struct Touch {
    /// Guidance from the first step to the last: points, with lines between them, such as 8,4,1.5
    #[arg(long, value_name = "G,G,..", value_delimiter = ',', value_parser = number, allow_hyphen_values = true)]
    pub guidance_curve: Vec<Micro>,
    /// A second prompt, mixed into the first
    #[arg(long, value_name = "TEXT")]
    pub mix_prompt: Option<String>,
    /// A second seed, whose noise is mixed into the first's
    #[arg(long, value_name = "SEED")]
    pub mix_seed: Option<u64>,
    /// How much of the second prompt and seed there is: 0 is the first, 1 the second, 3 far beyond it [default: 0.5]
    #[arg(long, value_name = "W", value_parser = number, allow_hyphen_values = true)]
    pub mix_weight: Option<Micro>,
    /// Blocks of the model to leave out, counted from 0
    #[arg(long, value_name = "N,N,..", value_delimiter = ',')]
    pub skip_layers: Vec<u32>,
    /// Blocks to go through once more, for each time they are named
    #[arg(long, value_name = "N,N,..", value_delimiter = ',')]
    pub repeat_layers: Vec<u32>,
    /// The channels of the latents in another order: for each, the one that it becomes
    #[arg(long, value_name = "N,N,..", value_delimiter = ',')]
    pub permute_channels: Vec<u32>,
    /// Factors of the latents' channels: one for all, or one each
    #[arg(long, value_name = "X,X,..", value_delimiter = ',', value_parser = number, allow_hyphen_values = true)]
    pub scale_channels: Vec<Micro>,
    /// What is added to the latents' channels: one number for all, or one each
    #[arg(long, value_name = "X,X,..", value_delimiter = ',', value_parser = number, allow_hyphen_values = true)]
    pub shift_channels: Vec<Micro>,
    /// After how many steps that is done to the channels [default: before the decode]
    #[arg(long, value_name = "STEP")]
    pub channels_after: Option<u32>,
    /// Save the initial noise too, in one file with the final latents
    #[arg(long)]
    pub return_noise: bool,
    /// Save the latents after these steps too, in one file with the final ones
    #[arg(long, value_name = "STEP,..", value_delimiter = ',')]
    pub return_steps: Vec<u32>,
    /// With --init-latents: they are those after so many steps, go on from there
    #[arg(long, value_name = "STEP", requires = "init_latents")]
    pub start_step: Option<u32>,
    /// With --init-latents: they are final ones, change them by this last part of the steps, above 0 to 1
    #[arg(long, value_name = "PART", requires = "init_latents", conflicts_with = "start_step", value_parser = number)]
    pub strength: Option<Micro>,
}

/// The flags, by which the tests look whether others know them.
#[cfg(test)]
pub(super) const NAMES: [&str; 14] = [
    "guidance_curve",
    "mix_prompt",
    "mix_seed",
    "mix_weight",
    "skip_layers",
    "repeat_layers",
    "permute_channels",
    "scale_channels",
    "shift_channels",
    "channels_after",
    "return_noise",
    "return_steps",
    "start_step",
    "strength",
];

impl Touch {
    /// The operations that the flags stand for.
    pub(super) fn ops(&self) -> Result<Vec<(String, OpValue)>, Failure> {
        let mut ops = Vec::new();
        let mut add = |name: &str, value: OpValue| ops.push((name.to_owned(), value));
        for (name, values) in [
            ("guidance.curve", &self.guidance_curve),
            ("channels.scale", &self.scale_channels),
            ("channels.shift", &self.shift_channels),
        ] {
            if !values.is_empty() {
                add(name, OpValue::Numbers(List::new(values.clone()).map_err(too_many(name))?));
            }
        }
        for (name, places) in [
            ("layers.skip", &self.skip_layers),
            ("layers.repeat", &self.repeat_layers),
            ("channels.permute", &self.permute_channels),
            ("latents.return_steps", &self.return_steps),
        ] {
            if !places.is_empty() {
                let places: Vec<_> =
                    places.iter().map(|place| Micro(i64::from(*place) * Micro::ONE.0)).collect();
                add(name, OpValue::Numbers(List::new(places).map_err(too_many(name))?));
            }
        }
        for (name, place) in
            [("channels.after", self.channels_after), ("latents.start_step", self.start_step)]
        {
            if let Some(place) = place {
                add(name, OpValue::Whole(i64::from(place)));
            }
        }
        if self.return_noise {
            add("latents.return_noise", OpValue::Flag(true));
        }
        if let Some(strength) = self.strength {
            add("denoise_strength", OpValue::Number(strength));
        }
        if self.mix_weight.is_some() && self.mix_prompt.is_none() && self.mix_seed.is_none() {
            return Err(Failure::usage("--mix-weight is of --mix-prompt or --mix-seed; give one of them"));
        }
        let weight = self.mix_weight.unwrap_or(Micro(Micro::ONE.0 / 2));
        if let Some(prompt) = &self.mix_prompt {
            ops.extend(second_prompt(prompt, weight));
        }
        if let Some(seed) = self.mix_seed {
            ops.extend(second_seed(seed, weight, false));
        }
        Ok(ops)
    }
}

/// A second prompt as operations.
pub(super) fn second_prompt(prompt: &str, weight: Micro) -> Vec<(String, OpValue)> {
    let parts = parts(prompt, MAX_LINE);
    let mut ops: Vec<_> = parts
        .into_iter()
        .map(|part| ("prompt.mix".to_owned(), OpValue::Text(Text::truncated(part))))
        .collect();
    ops.push(("prompt.weight".to_owned(), OpValue::Number(weight)));
    ops
}

/// A second seed as operations.
pub(super) fn second_seed(seed: u64, weight: Micro, linear: bool) -> Vec<(String, OpValue)> {
    // A seed has 64 bits without a sign, the wire's whole number has one.
    let mut ops = vec![
        ("noise.mix".to_owned(), OpValue::Whole(seed as i64)),
        ("noise.weight".to_owned(), OpValue::Number(weight)),
    ];
    if linear {
        ops.push(("noise.linear".to_owned(), OpValue::Flag(true)));
    }
    ops
}

/// A text in parts of at most so many bytes, cut between characters; one empty part for an empty text.
fn parts(text: &str, most: usize) -> Vec<&str> {
    let (mut parts, mut rest) = (Vec::new(), text);
    while rest.len() > most {
        let (part, behind) = rest.split_at(rest.floor_char_boundary(most));
        parts.push(part);
        rest = behind;
    }
    parts.push(rest);
    parts
}

fn too_many(name: &'static str) -> impl Fn(TooLong) -> Failure {
    move |TooLong { limit, given, .. }| {
        Failure::usage(format!("{name}: {given} numbers exceed the limit of {limit}"))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use kinoflock_protocol::ops;

    use super::*;
    use crate::cli::args::Command;

    fn flags(given: &[&str]) -> Touch {
        let plain = ["kinoflock", "generate", "a prompt"];
        match crate::cli::parse(plain.iter().chain(given)).unwrap().command {
            Command::Generate(args) => args.touch,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_flag_stands_for_an_operation_that_is_known_and_takes_its_value() {
        let all = flags(&[
            "--guidance-curve=-2,8.5,1",
            "--mix-prompt",
            "rain",
            "--mix-seed=18446744073709551615",
            "--mix-weight=-0.25",
            "--skip-layers=1,2",
            "--repeat-layers=0",
            "--permute-channels=1,0",
            "--scale-channels=-1",
            "--shift-channels=0.5",
            "--channels-after=0",
            "--return-noise",
            "--return-steps=3,1",
            "--init-latents=x",
            "--start-step=2",
        ]);
        let ops = all.ops().unwrap();
        for (name, value) in &ops {
            assert!(ops::find(name).is_some_and(|op| op.kind.takes(value)), "{name} {value:?}");
        }
        let value = |name: &str| ops.iter().find(|(given, _)| given == name).map(|(_, value)| value.clone());
        assert_eq!(value("noise.mix"), Some(OpValue::Whole(-1)));
        assert_eq!(value("noise.weight"), Some(OpValue::Number(Micro(-250_000))));
        let curve = [-2_000_000, 8_500_000, 1_000_000].map(Micro).to_vec();
        assert_eq!(value("guidance.curve"), Some(OpValue::Numbers(List::new(curve).unwrap())));
        let strength = flags(&["--init-latents=x", "--strength=0.4"]).ops().unwrap();
        assert_eq!(strength, [("denoise_strength".to_owned(), OpValue::Number(Micro(400_000)))]);
        assert!(flags(&[]).ops().unwrap().is_empty());
        assert!(flags(&["--mix-weight=1"]).ops().is_err());
    }

    #[test]
    fn a_long_second_prompt_is_cut_between_characters_and_loses_none() {
        let prompt = "ä".repeat(600);
        let parts = parts(&prompt, 511);
        assert!(parts.iter().all(|part| part.len() <= 511) && parts.concat() == prompt && parts.len() == 3);
        assert_eq!(super::parts("", 9), [""]);
    }

    #[test]
    fn the_names_of_the_flags_are_those_that_clap_knows() {
        let command = <crate::cli::Cli as clap::CommandFactory>::command();
        let generate = command.find_subcommand("generate").unwrap();
        let known: Vec<_> = generate.get_arguments().map(|argument| argument.get_id().as_str()).collect();
        assert!(NAMES.iter().all(|name| known.contains(name)));
        let heading = |name: &str| {
            generate
                .get_arguments()
                .find(|argument| argument.get_id() == name)
                .unwrap()
                .get_help_heading()
                .is_some()
        };
        let headed = known.iter().filter(|name| heading(name)).count();
        assert_eq!(headed, NAMES.len());
    }
}
