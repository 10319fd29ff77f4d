//! The command line of adapters.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use kinoflock_protocol::card::ConsentGiven;
use kinoflock_protocol::limits::WHOLE_BPS;
use kinoflock_protocol::{Micro, ModelId};

/// Millionths of a percent in a basis point.
const MICROS_OF_BPS: i64 = 10_000;

const ADD_EXAMPLES: &str = "\
Examples:
  kinoflock adapter add fog.safetensors --name fog --author Ada --licence CC-BY-4.0 \\
      --trained-on \"600 photographs of my own\" --consent own-work
  kinoflock adapter add fog.safetensors --author Ada --author Ben --credit Ada=60 --credit Ben=30 --base model1...=10
  kinoflock adapter add fog.safetensors --card fog.card.json      with the card that its author signed

The card is signed with your key. Its id goes into every job with the adapter and into the receipt, and the card itself
into every clip that you save: so whoever verifies the clip sees who made the adapter, from what, and how credit is
shared. Nodes that compute a job with it fetch the weights from you.";

/// What to do with adapters.
#[derive(Debug, Subcommand)]
pub enum AdapterCommand {
    /// Take a LoRA file in, and say who made it; prints its id
    #[command(after_help = ADD_EXAMPLES)]
    Add(Box<Add>),
    /// Your adapters
    List,
    /// What is known of an adapter: its card
    Show {
        /// Its name or id, or the beginning of its id
        adapter: String,
    },
    /// Write an adapter's signed card to a file, to be passed on with the weights
    Card {
        /// Its name or id, or the beginning of its id
        adapter: String,
        /// The file
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
    /// Remove an adapter's weights from this machine; its card stays, for the clips that were made with it
    Remove {
        /// Its name or id, or the beginning of its id
        adapter: String,
    },
}

/// An adapter and its card.
#[derive(Debug, Args)]
pub struct Add {
    /// The LoRA, a safetensors file
    pub file: PathBuf,
    /// The name by which you call it [default: that on its card, else the file's]
    #[arg(long)]
    pub name: Option<String>,
    /// The card that its author signed, as kinoflock adapter card writes it
    #[arg(long, value_name = "FILE", conflicts_with_all = ["author", "summary", "licence", "trained_on", "consent", "credit", "base"])]
    pub card: Option<PathBuf>,
    /// Who made it; several times for several [default: the artist of your configuration]
    #[arg(long, value_name = "NAME")]
    pub author: Vec<String>,
    /// What it is and what it is for
    #[arg(long, value_name = "TEXT")]
    pub summary: Option<String>,
    /// Its licence, such as CC-BY-4.0
    #[arg(long)]
    pub licence: Option<String>,
    /// What it was trained on; without it the card says that this is not told
    #[arg(long, value_name = "TEXT")]
    pub trained_on: Option<String>,
    /// Whether those agreed whose work it was trained on: own-work, all, by-licence, some, none or unknown
    #[arg(long, value_name = "WHO", value_parser = consent)]
    pub consent: Option<ConsentGiven>,
    /// Part of the credit in percent, such as Ada=60 [default: the same for every author]
    #[arg(long, value_name = "NAME=PERCENT", value_parser = credit)]
    pub credit: Vec<(String, u16)>,
    /// The model that it was trained on, and the part of the credit that goes there, such as model1...=10
    #[arg(long, value_name = "MODEL=PERCENT", value_parser = base)]
    pub base: Vec<(ModelId, u16)>,
}

fn consent(text: &str) -> Result<ConsentGiven, String> {
    match text {
        "own-work" => Ok(ConsentGiven::OwnWork),
        "all" => Ok(ConsentGiven::All),
        "by-licence" => Ok(ConsentGiven::ByLicence),
        "some" => Ok(ConsentGiven::Some),
        "none" => Ok(ConsentGiven::None),
        "unknown" => Ok(ConsentGiven::Unknown),
        _ => Err("own-work, all, by-licence, some, none or unknown".to_owned()),
    }
}

/// `NAME=PERCENT`, as basis points.
fn credit(text: &str) -> Result<(String, u16), String> {
    let parts = text.rsplit_once('=').filter(|(name, _)| !name.is_empty());
    let (name, percent) = parts.ok_or("a part of the credit is NAME=PERCENT, such as Ada=60")?;
    let micros = percent.trim().parse::<Micro>().map_err(|error| error.to_string())?.0;
    let bps = u16::try_from(micros / MICROS_OF_BPS).ok().filter(|bps| *bps <= WHOLE_BPS);
    let bps = bps.filter(|_| micros % MICROS_OF_BPS == 0);
    let bps = bps.ok_or("percent are 0 to 100, with at most 2 digits after the point")?;
    Ok((name.to_owned(), bps))
}

fn base(text: &str) -> Result<(ModelId, u16), String> {
    let (model, bps) = credit(if text.contains('=') { text } else { return base(&format!("{text}=0")) })?;
    Ok((model.parse::<ModelId>().map_err(|error| error.to_string())?, bps))
}
