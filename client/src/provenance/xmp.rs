//! The XMP packet of an exported clip: written in one form only, and read back from that form only.
//!
//! Every value stands in an element of its own. The checksum is blake3 over the packet with zeros in the checksum's
//! place, so that no byte of the packet can change unseen.

use std::fmt::Write as _;

use data_encoding::BASE64;
use kinoflock_protocol::receipt::Receipt;
use kinoflock_protocol::{Envelope, JobSpec, Micro, NetworkId};

use super::{SOURCE_TYPE, SOURCE_TYPE_COMPOSITE, Statement};
use crate::verify::ClipInfo;

/// The namespace of our properties.
const NAMESPACE: &str = "urn:kinoflock:provenance:1";
/// Characters of the checksum.
const CHECK_LEN: usize = 64;

/// What the exporter says beside what is signed in the receipt.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// Name by which the node offered the model.
    pub model_name: String,
    /// Number of frames.
    pub frames: u32,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Frames per second, as asked.
    pub fps: Micro,
    /// Guidance scale.
    pub guidance: Micro,
    /// Whether another's picture or clip went in.
    pub composite: bool,
    /// The artist's name.
    pub artist: Option<String>,
    /// The clip's licence.
    pub licence: Option<String>,
    /// The prompt, if the artist put it in.
    pub prompt: Option<String>,
    /// The negative prompt, if the artist put it in.
    pub negative_prompt: Option<String>,
}

impl Facts {
    pub(super) fn of(spec: &JobSpec, info: &ClipInfo, model_name: &str, with_prompt: bool) -> Self {
        let text = |text: &str| (with_prompt && !text.is_empty()).then(|| text.to_owned());
        let pictures = [spec.start_image, spec.end_image, spec.extend];
        Self {
            model_name: model_name.to_owned(),
            frames: info.frames,
            width: info.width,
            height: info.height,
            fps: spec.fps,
            guidance: spec.guidance,
            composite: pictures.iter().any(Option::is_some) || !spec.keyframes.is_empty(),
            artist: spec.artist.as_ref().map(|name| name.to_string()),
            licence: spec.licence.as_ref().map(|name| name.to_string()),
            prompt: text(spec.prompt.as_str()),
            negative_prompt: text(spec.negative_prompt.as_str()),
        }
    }
}

/// A packet as it was read.
pub(super) struct Packet {
    pub(super) network: NetworkId,
    pub(super) receipt: Envelope,
    pub(super) answer: Option<Envelope>,
    pub(super) job: Option<Envelope>,
    pub(super) cards: Vec<Envelope>,
    pub(super) facts: Facts,
    adapters: Vec<String>,
    shown: Vec<(&'static str, String)>,
}

impl Packet {
    /// Whether what the packet shows for people is what the receipt and the clip say.
    pub(super) fn check_facts(&self, receipt: &Receipt, info: &ClipInfo) -> Result<(), String> {
        for (name, value) in signed_facts(receipt) {
            let shown = self.shown.iter().find(|(key, _)| *key == name).map(|(_, shown)| shown.as_str());
            if shown != Some(value.as_str()) {
                return Err(format!("it shows {name} {:?}, the receipt says {value:?}", shown.unwrap_or("")));
            }
        }
        if self.adapters != adapters(receipt) {
            return Err("it shows other adapters than the receipt".to_owned());
        }
        let Facts { frames, width, height, .. } = self.facts;
        if (frames, width, height) != (info.frames, info.width, info.height) {
            return Err("it shows another number of frames or another size than the clip has".to_owned());
        }
        Ok(())
    }
}

/// Whether this packet is one of ours, whole or damaged.
pub(super) fn is_ours(packet: &[u8]) -> bool {
    packet.windows(NAMESPACE.len()).any(|window| window == NAMESPACE.as_bytes())
}

/// What the packet repeats from the receipt for people and tools.
fn signed_facts(receipt: &Receipt) -> [(&'static str, String); 8] {
    [
        ("clip", receipt.clip.to_string()),
        ("job", receipt.job.to_string()),
        ("node", receipt.node.to_string()),
        ("requester", receipt.requester.to_string()),
        ("model", receipt.model.to_string()),
        ("seed", receipt.seed.to_string()),
        ("steps", receipt.steps.to_string()),
        ("made", receipt.finished_at.to_string()),
    ]
}

/// The adapters and how strongly they acted, as the receipt says.
fn adapters(receipt: &Receipt) -> Vec<String> {
    receipt.adapters.iter().map(|used| format!("{}@{}", used.weights, used.scale)).collect()
}

pub(super) fn write(statement: &Statement<'_>, receipt: &Receipt, facts: &Facts) -> String {
    let mut body = String::new();
    let mut element = |name: &str, value: &str| {
        // A String takes whatever is written.
        let _ = writeln!(body, "   <kinoflock:{name}>{}</kinoflock:{name}>", escape(value));
    };
    element("network", &statement.network.to_string());
    for (name, value) in signed_facts(receipt) {
        element(name, &value);
    }
    for adapter in adapters(receipt) {
        element("adapter", &adapter);
    }
    element("modelName", &facts.model_name);
    element("frames", &facts.frames.to_string());
    element("width", &facts.width.to_string());
    element("height", &facts.height.to_string());
    element("fps", &facts.fps.to_string());
    element("guidance", &facts.guidance.to_string());
    let optional = [
        ("artist", &facts.artist),
        ("licence", &facts.licence),
        ("prompt", &facts.prompt),
        ("negativePrompt", &facts.negative_prompt),
    ];
    for (name, value) in optional {
        if let Some(value) = value {
            element(name, value);
        }
    }
    element("receipt", &BASE64.encode(&statement.receipt.encode()));
    if let Some(answer) = statement.answer {
        element("answer", &BASE64.encode(&answer.encode()));
    }
    if statement.with_prompt {
        element("signedJob", &BASE64.encode(&statement.job.encode()));
    }
    for card in statement.cards {
        element("card", &BASE64.encode(&card.encode()));
    }
    element("check", &"0".repeat(CHECK_LEN));
    let packet = frame(facts, &body);
    let check = blake3::hash(packet.as_bytes()).to_hex();
    packet.replacen(&check_element(&"0".repeat(CHECK_LEN)), &check_element(&check), 1)
}

/// What surrounds our elements, with the properties of other vocabularies that tools look for.
fn frame(facts: &Facts, body: &str) -> String {
    let source = if facts.composite { SOURCE_TYPE_COMPOSITE } else { SOURCE_TYPE };
    let mut known = String::new();
    if let Some(artist) = &facts.artist {
        let artist = escape(artist);
        known += &format!("   <dc:creator><rdf:Seq><rdf:li>{artist}</rdf:li></rdf:Seq></dc:creator>\n");
    }
    if let Some(licence) = &facts.licence {
        let licence = escape(licence);
        known += &format!(
            "   <dc:rights><rdf:Alt><rdf:li xml:lang=\"x-default\">{licence}</rdf:li></rdf:Alt></dc:rights>\n"
        );
    }
    format!(
        "<?xpacket begin=\"\u{feff}\" id=\"W5M0MpCehiHzreSzNTczkc9d\"?>\n\
         <x:xmpmeta xmlns:x=\"adobe:ns:meta/\">\n \
         <rdf:RDF xmlns:rdf=\"http://www.w3.org/1999/02/22-rdf-syntax-ns#\">\n  \
         <rdf:Description rdf:about=\"\"\n    \
         xmlns:Iptc4xmpExt=\"http://iptc.org/std/Iptc4xmpExt/2008-02-29/\"\n    \
         xmlns:dc=\"http://purl.org/dc/elements/1.1/\"\n    \
         xmlns:xmp=\"http://ns.adobe.com/xap/1.0/\"\n    \
         xmlns:kinoflock=\"{NAMESPACE}\">\n   \
         <Iptc4xmpExt:DigitalSourceType>{source}</Iptc4xmpExt:DigitalSourceType>\n   \
         <xmp:CreatorTool>kinoflock</xmp:CreatorTool>\n\
         {known}{body}  \
         </rdf:Description>\n </rdf:RDF>\n</x:xmpmeta>\n<?xpacket end=\"r\"?>"
    )
}

/// The packet, if no byte of it changed; else what is wrong.
pub(super) fn read(bytes: &[u8]) -> Result<Packet, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "it is no longer text".to_owned())?;
    let check = value(text, "check").filter(|check| check.len() == CHECK_LEN).ok_or("it has no checksum")?;
    let zeroed = text.replacen(&check_element(&check), &check_element(&"0".repeat(CHECK_LEN)), 1);
    let given = blake3::hash(zeroed.as_bytes()).to_hex();
    if *check != *given {
        return Err(format!("its checksum is {}..., it should be {}...", &given[..12], &check[..12]));
    }
    let need = |name: &'static str| value(text, name).ok_or_else(|| format!("it has no {name}"));
    let number =
        |name: &'static str| need(name)?.parse::<u32>().map_err(|_| format!("its {name} is no number"));
    let micro =
        |name: &'static str| need(name)?.parse::<Micro>().map_err(|_| format!("its {name} is no number"));
    let envelope = |text: String| -> Result<Envelope, String> {
        let bytes = BASE64.decode(text.as_bytes()).map_err(|error| error.to_string())?;
        Envelope::decode(&bytes).map_err(|error| error.to_string())
    };
    let names = ["clip", "job", "node", "requester", "model", "seed", "steps", "made"];
    let shown = names.into_iter().map(|name| Ok((name, need(name)?))).collect::<Result<_, String>>()?;
    let facts = Facts {
        model_name: need("modelName")?,
        frames: number("frames")?,
        width: number("width")?,
        height: number("height")?,
        fps: micro("fps")?,
        guidance: micro("guidance")?,
        composite: text.contains(SOURCE_TYPE_COMPOSITE),
        artist: value(text, "artist"),
        licence: value(text, "licence"),
        prompt: value(text, "prompt"),
        negative_prompt: value(text, "negativePrompt"),
    };
    Ok(Packet {
        network: need("network")?.parse().map_err(|_| "its network is no network id".to_owned())?,
        receipt: envelope(need("receipt")?)?,
        answer: value(text, "answer").map(envelope).transpose()?,
        job: value(text, "signedJob").map(envelope).transpose()?,
        cards: values(text, "card").map(envelope).collect::<Result<_, _>>()?,
        adapters: values(text, "adapter").collect(),
        facts,
        shown,
    })
}

fn check_element(check: &str) -> String {
    format!("<kinoflock:check>{check}</kinoflock:check>")
}

fn value(text: &str, name: &str) -> Option<String> {
    let (_, rest) = text.split_once(&format!("<kinoflock:{name}>"))?;
    let (value, _) = rest.split_once(&format!("</kinoflock:{name}>"))?;
    Some(unescape(value))
}

/// Every value of that name.
fn values<'a>(text: &'a str, name: &str) -> impl Iterator<Item = String> + 'a {
    let (open, close) = (format!("<kinoflock:{name}>"), format!("</kinoflock:{name}>"));
    let mut rest = text;
    std::iter::from_fn(move || {
        let (value, behind) = rest.split_once(&open)?.1.split_once(&close)?;
        rest = behind;
        Some(unescape(value))
    })
}

/// XML text; what XML 1.0 cannot hold at all becomes the replacement character.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\r' => out.push_str("&#13;"),
            c if c < ' ' && c != '\n' && c != '\t' => out.push('\u{fffd}'),
            '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

fn unescape(text: &str) -> String {
    text.replace("&#13;", "\r").replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&")
}
