//! The command line: commands, flags, and help written for artists.

mod adapter;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use kinoflock_protocol::Micro;
use kinoflock_protocol::job::{OpValue, Share};

pub(super) use self::adapter::{AdapterCommand, Add};
use super::latents::LatentsCommand;
use super::touch::Touch;

/// Make videos from words on other people's machines, without a company in the middle.
#[derive(Debug, Parser)]
#[command(name = "kinoflock", version, propagate_version = true, after_help = EXAMPLES)]
pub struct Cli {
    /// Flags of every command.
    #[command(flatten)]
    pub common: Common,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
First steps:
  kinoflock join kfnode1...                      a ticket from somebody who runs a node
  kinoflock generate \"a red circle drifts left\" -o clip.mp4
  kinoflock verify clip.mp4                      who made it, and is it unchanged?

Exit codes: 0 done, 1 other error, 2 wrong use, 3 configuration or key, 4 no node, 5 the job failed at the node,
6 refused by a rule of the node, 7 verification failed, 8 took too long, 130 Ctrl-C (the job goes on; its id is printed)";

const GENERATE_EXAMPLES: &str = "\
Examples:
  kinoflock generate \"a red circle drifts left over a blue field\" -o clip.mp4
  kinoflock generate \"a paper boat in the rain\" --seconds 4 --size 768x512 --steps 40
  kinoflock generate --prompt-file prompt.txt --seed 7          the same seed draws the same picture
  kinoflock generate \"night train\" --lora fog.safetensors@0.8 --lora rain@-0.3     what two LoRAs make of it
  kinoflock generate \"night train\" --detach                     prints the job; later: kinoflock wait JOB
  kinoflock generate \"night train\" --seconds 8 --dry-run         who could make it, and how soon? Nothing is sent
  kinoflock generate \"night train\" --variations 8 -o train.mp4   eight seeds on many nodes: train-SEED.mp4
  kinoflock generate --batch jobs.jsonl --in-flight 8             a night's work; run it again to go on
    {\"prompt\": \"night train\", \"seed\": 7, \"output\": \"train.mp4\"}    a line of jobs.jsonl

The node that makes the clip reads your prompt and sees the frames. Which node that is, and what it promises, is shown
before anything is sent. The prompt goes into the file only with --with-prompt.";

/// Flags of every command.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// Records for programs: one line of JSON each, on standard output
    #[arg(long, global = true)]
    pub json: bool,
    /// Only data and errors
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Tell more about what happens inside (twice: everything)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Configuration file [default: config.toml in the configuration folder]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Folder of jobs and clips
    #[arg(long, global = true, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// File of your key
    #[arg(long, global = true, value_name = "FILE")]
    pub key: Option<PathBuf>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a clip from words
    #[command(visible_alias = "run", after_help = GENERATE_EXAMPLES)]
    Generate(Box<Generate>),
    /// Jobs under way
    Ps {
        /// Finished ones too
        #[arg(short, long)]
        all: bool,
    },
    /// How a job stands
    Status {
        /// Its id, or the beginning of it
        job: String,
    },
    /// Wait for a job and fetch its clip
    Wait {
        /// Its id, or the beginning of it
        job: String,
        /// Give up waiting after so many seconds; the job goes on
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<u64>,
        /// How the clip is saved.
        #[command(flatten)]
        save: Save,
    },
    /// Stop a job
    Cancel {
        /// Its id, or the beginning of it
        job: String,
    },
    /// Your clips
    Ls,
    /// Save a clip as a file: one of yours, or one that you have a ticket for
    Get {
        /// A clip's or job's id or the beginning of it, or a ticket (kfclip1...)
        clip: String,
        /// How the clip is saved.
        #[command(flatten)]
        save: Save,
    },
    /// Print a ticket for a clip: whoever has it can fetch the clip
    Share {
        /// Its id, or the beginning of it
        clip: String,
    },
    /// Remove clips or jobs from this machine
    Rm {
        /// Ids of clips or jobs, or the beginnings of them
        #[arg(required = true)]
        ids: Vec<String>,
    },
    /// Forget a clip here and ask every node that had it to forget it too: frames, latents, prompt
    Forget {
        /// Its id or that of its job, or the beginning of it
        clip: String,
    },
    /// Have another node look at one step of a finished job: did its node compute what it signed? The auditor sees the
    /// prompt, the clip and four states of the latents
    Audit {
        /// A clip's or job's id, or the beginning of it
        clip: String,
        /// Only this node: a ticket, an address, or a node id
        #[arg(long, value_name = "ADDR|TICKET")]
        by: Option<String>,
    },
    /// What is known of a clip: how it was made and with what
    Show {
        /// A file, or a clip's or job's id
        what: String,
    },
    /// Check a file by itself: which node made it, with which model, for whom, and whether it was changed
    Verify {
        /// The file
        file: PathBuf,
    },
    /// Nodes that can be reached
    Nodes {
        /// Which nodes to ask.
        #[command(flatten)]
        node: Where,
    },
    /// Models that nodes offer
    Models {
        /// Which nodes to ask.
        #[command(flatten)]
        node: Where,
    },
    /// Remember a node or a network by its ticket or address
    Join {
        /// The ticket (kfnode1...) or address
        ticket: String,
    },
    /// Print a ticket for nodes that you know, to pass on the way in
    Ticket,
    /// Your adapters (LoRA): who made them, from what, and how credit is shared
    Adapter {
        /// What to do with them.
        #[command(subcommand)]
        command: AdapterCommand,
    },
    /// Latents: look at them, mix them, walk between seeds and prompts, decode them
    Latents {
        /// What to do with them.
        #[command(subcommand)]
        command: LatentsCommand,
    },
    /// The operations that a job may ask for with --set, and what each does
    Ops,
    /// Signed lists of nodes and models: those of others that you go by, and your own
    List {
        /// What to do with them.
        #[command(subcommand)]
        command: ListCommand,
    },
    /// Your key: who you are to nodes and on your clips
    Key {
        /// What to do with it.
        #[command(subcommand)]
        command: Key,
    },
    /// Print a script that completes commands in your shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// What to do with lists.
#[derive(Debug, Subcommand)]
pub enum ListCommand {
    /// Sign a list with your key and hand it to nodes that hold it; prints the list's name
    #[command(after_help = LIST_FILES)]
    Publish {
        /// What it lists
        #[arg(long, value_enum)]
        kind: Sort,
        /// The list, as TOML
        file: PathBuf,
        /// Which nodes to hand it to.
        #[command(flatten)]
        node: Where,
    },
    /// Go by a list from now on
    Add {
        /// Its name (kflist1...)
        name: String,
    },
    /// Go by a list no longer
    Remove {
        /// Its name (kflist1...)
        name: String,
    },
    /// Lists that you go by, or what one of them says
    Show {
        /// Its name (kflist1...)
        name: Option<String>,
    },
}

/// What a list holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Sort {
    /// Ways into the network.
    Nodes,
    /// Models under the names that people know.
    Models,
}

const LIST_FILES: &str = "\
A list of nodes:
  name = \"friends of the reef\"
  nodes = [\"kfnode1...\", \"/dnsaddr/reef.example\"]

A list of models:
  name = \"models that we looked into\"
  days = 30                              how long it is good for [default: 90]
  [[models]]
  model = \"model1...\"
  name = \"motif\"
  architecture = \"ltx-video\"
  licence = \"Apache-2.0\"
  source = \"https://reef.example/motif\"";

/// Which nodes to ask.
#[derive(Debug, Clone, Default, Args)]
pub struct Where {
    /// Only this node: a ticket, an address, or a node id
    #[arg(long, value_name = "ADDR|TICKET", env = "KINOFLOCK_NODE")]
    pub node: Option<String>,
}

/// How a clip is saved.
#[derive(Debug, Clone, Default, Args)]
pub struct Save {
    /// Where to save the clip; - for standard output [default: kinoflock-XXXXXXXX.mp4 here]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Write the prompt into the file, with the signed job that proves it
    #[arg(long)]
    pub with_prompt: bool,
    /// Save the bytes as the node signed them, without provenance
    #[arg(long, conflicts_with = "with_prompt")]
    pub bare: bool,
}

/// What each line of a batch says for itself.
const NOT_WITH_BATCH: &[&str] = &[
    "prompt",
    "prompt_file",
    "negative",
    "seed",
    "frames",
    "seconds",
    "size",
    "fps",
    "steps",
    "guidance",
    "init_latents",
    "lora",
    "set",
    "latents",
    "licence",
    "custodians",
    "share",
    "output",
    "with_prompt",
    "bare",
    "variations",
    "dry_run",
    "detach",
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

/// A clip from words.
#[derive(Debug, Args)]
pub struct Generate {
    /// What is to be seen
    #[arg(required_unless_present_any = ["prompt_file", "batch"], conflicts_with = "prompt_file")]
    pub prompt: Option<String>,
    /// Read the prompt from a file; - for standard input
    #[arg(long, value_name = "FILE")]
    pub prompt_file: Option<PathBuf>,
    /// Model: a name or an id [default: the only one offered]
    #[arg(short, long)]
    pub model: Option<String>,
    /// What is not to be seen
    #[arg(short, long, value_name = "TEXT", default_value = "")]
    pub negative: String,
    /// Number from which the picture grows; the same number, the same picture [default: random]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Number of frames
    #[arg(long, conflicts_with = "seconds")]
    pub frames: Option<u32>,
    /// About how many seconds: the nearest length that the model can make
    #[arg(long, value_parser = number)]
    pub seconds: Option<Micro>,
    /// Size in pixels, such as 768x512
    #[arg(long, value_name = "WxH", value_parser = size)]
    pub size: Option<(u32, u32)>,
    /// Frames per second
    #[arg(long, value_parser = number)]
    pub fps: Option<Micro>,
    /// Number of denoising steps: more is slower and often better
    #[arg(long)]
    pub steps: Option<u32>,
    /// How closely to follow the prompt; 1 is not at all forced
    #[arg(long, value_parser = number, allow_negative_numbers = true)]
    pub guidance: Option<Micro>,
    /// Image that the clip begins with, PNG or JPEG; it is scaled and cut to the clip's size
    #[arg(long, value_name = "FILE", conflicts_with = "detach")]
    pub image: Option<PathBuf>,
    /// Image that the clip ends with
    #[arg(long, value_name = "FILE", conflicts_with = "detach")]
    pub end_image: Option<PathBuf>,
    /// Image that a frame shows, such as 24=door.png; frames count from 0
    #[arg(long, value_name = "FRAME=FILE", value_parser = keyframe, conflicts_with = "detach")]
    pub keyframe: Vec<(u32, PathBuf)>,
    /// Latents to begin from instead of noise: a safetensors file, or a clip of yours whose latents came with it
    #[arg(long, value_name = "FILE|CLIP", conflicts_with = "detach")]
    pub init_latents: Option<PathBuf>,
    /// Clip of yours to go on from: the new one begins with its last frames, as many as the model can take or as
    /// --set extend_frames=N says
    #[arg(long, value_name = "CLIP", conflicts_with_all = ["image", "detach"])]
    pub extend: Option<String>,
    /// Adapter (LoRA) and its weight: a safetensors file, or the name or id of one that you took in with kinoflock
    /// adapter add, such as fog.safetensors@0.8. Several times for several; any number, also below 0 [default weight: 1]
    #[arg(long, value_name = "FILE|ID@WEIGHT", conflicts_with = "detach")]
    pub lora: Vec<String>,
    /// A further operation by name; kinoflock ops lists them. A node that does not know one says so
    #[arg(long, value_name = "K=V", value_parser = operation)]
    pub set: Vec<(String, OpValue)>,
    /// What happens inside the run.
    #[command(flatten)]
    pub touch: Touch,
    /// Which node is to make it.
    #[command(flatten)]
    pub at: Where,
    /// Only nodes of this collective (not there yet)
    #[arg(long, value_name = "ID")]
    pub collective: Option<String>,
    /// Save the final latents too, beside the clip
    #[arg(long)]
    pub latents: bool,
    /// Licence that the clip is to carry, such as CC-BY-4.0
    #[arg(long)]
    pub licence: Option<String>,
    /// Only nodes that promise to keep nothing beyond a week, not to train on it, and to claim no rights
    #[arg(long)]
    pub require_terms: bool,
    /// How many further nodes watch the job while this machine is away, and give it to another if its node dies; they
    /// could read the prompt too [default: 2, none with --node]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=8))]
    pub custodians: Option<u8>,
    /// Who may hold sealed copies of the clip, which only you can open: none, collective or public
    #[arg(long, value_name = "WHOM", default_value = "none", value_parser = share)]
    pub share: Share,
    /// Only ask which nodes could make it, when, and how much work it is; neither prompt nor files are sent
    #[arg(long, conflicts_with_all = ["detach", "timeout"])]
    pub dry_run: bool,
    /// So many clips of the same words, each with the next seed, spread over the nodes; clip.mp4 becomes clip-SEED.mp4
    #[arg(long, value_name = "N", conflicts_with = "dry_run", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub variations: Option<u32>,
    /// Make all jobs of a file: one JSON object a line, with these flags as names. Run again, it goes on where it was
    #[arg(long, value_name = "FILE", conflicts_with_all = NOT_WITH_BATCH)]
    pub batch: Option<PathBuf>,
    /// With --batch: so many jobs at a time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=32))]
    pub in_flight: u32,
    /// Hand the job over, print its id, and leave
    #[arg(long)]
    pub detach: bool,
    /// Give up waiting after so many seconds; the job goes on
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
    /// How the clip is saved.
    #[command(flatten)]
    pub save: Save,
}

/// What to do with your key.
#[derive(Debug, Subcommand)]
pub enum Key {
    /// Make a key
    New,
    /// Print the public key, by which nodes know you
    Show,
    /// Copy the key to a file that only you can read
    Export {
        /// The file; it must not exist yet
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
    /// Take a key from a file
    Import {
        /// The file
        file: PathBuf,
    },
    /// Print the key as 24 words to write on paper
    Backup,
    /// Make the key again from its 24 words
    #[command(
        after_help = "Without words they are read from standard input, so that they do not stay in your shell's history."
    )]
    Restore {
        /// The words
        words: Vec<String>,
    },
}

fn share(text: &str) -> Result<Share, String> {
    match text {
        "none" => Ok(Share::None),
        "collective" => Ok(Share::Collective),
        "public" => Ok(Share::Public),
        _ => Err("a clip is shared with none, collective or public".to_owned()),
    }
}

pub(super) fn number(text: &str) -> Result<Micro, String> {
    text.parse::<Micro>().map_err(|error| error.to_string())
}

pub(super) fn size(text: &str) -> Result<(u32, u32), String> {
    let parse = |side: &str| side.trim().parse::<u32>().ok();
    let sides = text.split_once(['x', 'X', '×']).and_then(|(w, h)| parse(w).zip(parse(h)));
    sides.ok_or_else(|| "a size is width x height in pixels, such as 768x512".to_owned())
}

/// `FRAME=FILE`.
fn keyframe(text: &str) -> Result<(u32, PathBuf), String> {
    let parts =
        text.split_once('=').and_then(|(frame, file)| Some((frame.parse().ok()?, PathBuf::from(file))));
    parts.ok_or_else(|| "a keyframe is FRAME=FILE, such as 24=door.png".to_owned())
}

/// `K=V`: true and false, whole numbers, numbers, lists of numbers with commas; everything else is text.
pub(super) fn operation(text: &str) -> Result<(String, OpValue), String> {
    let (key, value) = text.split_once('=').ok_or("an operation is NAME=VALUE")?;
    if key.is_empty() {
        return Err("an operation is NAME=VALUE, the name is missing".to_owned());
    }
    let too_long = |error: kinoflock_protocol::codec::TooLong| error.to_string();
    let numbers: Option<Vec<Micro>> = value.split(',').map(|part| part.trim().parse().ok()).collect();
    let value = match (value, numbers) {
        ("true", _) => OpValue::Flag(true),
        ("false", _) => OpValue::Flag(false),
        (text, _) if text.parse::<i64>().is_ok() => OpValue::Whole(text.parse().unwrap_or_default()),
        (_, Some(numbers)) if numbers.len() > 1 => {
            OpValue::Numbers(kinoflock_protocol::List::new(numbers).map_err(too_long)?)
        }
        (_, Some(numbers)) if numbers.len() == 1 => OpValue::Number(numbers[0]),
        (text, _) => OpValue::Text(kinoflock_protocol::Text::new(text).map_err(too_long)?),
    };
    Ok((key.to_owned(), value))
}
