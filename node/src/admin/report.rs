//! What `/status` and `kinoflockd status` show: the daemon's state as plain data, without prompt or key of a requester.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The daemon at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusReport {
    /// Version of this document; a new field does not change it, a changed one does.
    pub schema: u32,
    /// The node's id.
    pub node: String,
    /// The network's name or id.
    pub network: String,
    /// The program's version.
    pub version: String,
    /// Seconds since the start.
    pub uptime_seconds: u64,
    /// Addresses on which the node listens, with its id.
    pub addresses: Vec<String>,
    /// Peers connected now.
    pub peers: usize,
    /// Whether the node takes new jobs, and if not, why.
    pub accepting: Result<(), String>,
    /// The devices.
    pub devices: Vec<DeviceReport>,
    /// Jobs that run or wait, first the ones that run.
    pub jobs: Vec<JobReport>,
    /// Bytes of clips stored.
    pub clip_bytes: u64,
    /// Most bytes of clips stored.
    pub clip_bytes_limit: u64,
    /// Jobs done, failed and cancelled since the start.
    pub jobs_done: u64,
    /// Nodes whose adverts were heard.
    #[serde(default)]
    pub known_nodes: usize,
    /// Jobs of others that are watched.
    #[serde(default)]
    pub watched_jobs: usize,
    /// Bytes held sealed for others.
    #[serde(default)]
    pub held_bytes: u64,
    /// What came of the quotes that were asked here.
    #[serde(default)]
    pub quotes: QuotesReport,
    /// Seconds since other nodes were last asked whether they see this one, and what they said.
    #[serde(default)]
    pub seen: Option<(u64, Vec<SeenReport>)>,
    /// Audits since the start.
    #[serde(default)]
    pub audits: AuditsReport,
    /// Models that are fetched from other nodes and held.
    #[serde(default)]
    pub archive: Vec<ArchiveReport>,
    /// Jobs failed since the start.
    pub jobs_failed: u64,
    /// Jobs cancelled since the start.
    pub jobs_cancelled: u64,
}

/// A model that is fetched from other nodes and held.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArchiveReport {
    /// As the operator calls it.
    pub name: String,
    /// `waits`, `comes` or `held`.
    pub state: String,
    /// Its id, once it is held.
    pub model: Option<String>,
    /// Bytes that are here.
    pub done: u64,
    /// Bytes of all; 0 until that is known.
    pub total: u64,
    /// Why it waits; empty if it does not.
    pub text: String,
}

/// How many nodes hold a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldersReport {
    /// Its id.
    pub model: String,
    /// Nodes that are known to hold it, this one among them.
    pub holders: usize,
}

/// Audits since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditsReport {
    /// Jobs of others that were audited here and are as they should be.
    pub honest: u64,
    /// Jobs of others whose maker did not compute what it signed.
    pub caught: u64,
    /// Audits for others of which nothing can be said.
    pub could_not_look: u64,
    /// Audits for others that wait or run.
    pub waiting: usize,
    /// Times that steps of own jobs were shown.
    pub shown: u64,
}

/// Quotes of the last hours.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct QuotesReport {
    /// How many hours.
    pub hours: u64,
    /// Asked.
    pub asked: u64,
    /// Offered a place.
    pub offered: u64,
    /// Places that were ordered.
    pub won: u64,
    /// Places that ran out unused.
    pub expired: u64,
    /// Places that were given back, by reason.
    pub lost: Vec<Counted>,
    /// By how much the others were sooner on average, where that was the reason.
    pub sooner_by_seconds: Option<f64>,
    /// Refused, by reason.
    pub refused: Vec<Counted>,
    /// Models that were sought here and are not served.
    pub unserved: Vec<Counted>,
}

/// Something and how often it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    /// What.
    pub what: String,
    /// How often.
    pub count: u64,
}

/// What another node said of this one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenReport {
    /// Which node was asked.
    pub node: String,
    /// Whether it could connect anew.
    pub reached: bool,
    /// Whether it got a quote.
    pub quoted: bool,
    /// What went wrong; empty if nothing did.
    pub text: String,
}

/// What is told in red: no job can come this way.
pub const NOT_REACHABLE: &str = "NOT REACHABLE";

/// One device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceReport {
    /// The name from the configuration.
    pub name: String,
    /// `idle`, `running`, `paused`, `draining`, `testing models`, `without a worker`.
    pub state: String,
    /// Seconds until it leaves that state by itself, if it does.
    #[serde(default)]
    pub for_seconds: Option<u64>,
    /// Models served here, with their measured speed.
    pub models: Vec<ModelReport>,
}

/// One model on one device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelReport {
    /// The model's alias here.
    pub name: String,
    /// The model's id.
    pub id: String,
    /// `passed`, `unreferenced`, or why it is not advertised.
    pub self_test: String,
    /// Measured speed in TFLOP of work a second, if measured yet.
    pub tflop_per_second: Option<f64>,
}

/// One job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobReport {
    /// The job's id.
    pub job: String,
    /// `running`, `queued`, `awaiting inputs`.
    pub state: String,
    /// The device that runs it.
    pub device: Option<String>,
    /// Steps done and asked for, once it runs.
    pub step: Option<(u32, u32)>,
    /// Jobs before this one.
    pub position: Option<u32>,
    /// Expected seconds until it is done.
    pub eta_seconds: Option<f64>,
}

impl fmt::Display for StatusReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "node {} on network {}", self.node, self.network)?;
        writeln!(f, "kinoflockd {}, up {}", self.version, Span(self.uptime_seconds))?;
        match &self.accepting {
            Ok(()) => writeln!(f, "takes jobs, peers connected: {}", self.peers)?,
            Err(reason) => writeln!(f, "takes no jobs: {reason}; peers connected: {}", self.peers)?,
        }
        self.fmt_seen(f)?;
        for device in &self.devices {
            write!(f, "device {}: {}", device.name, device.state)?;
            match device.for_seconds {
                Some(seconds) => writeln!(f, ", for another {}", Span(seconds))?,
                None => writeln!(f)?,
            }
            for model in &device.models {
                write!(f, "  {} self-test {}", model.name, model.self_test)?;
                match model.tflop_per_second {
                    Some(speed) => writeln!(f, ", {speed:.3} TFLOP/s")?,
                    None => writeln!(f, ", speed not measured yet")?,
                }
            }
        }
        if self.jobs.is_empty() {
            writeln!(f, "no job runs or waits")?;
        }
        for job in &self.jobs {
            writeln!(f, "job {job}")?;
        }
        self.quotes.fmt(f)?;
        writeln!(
            f,
            "done {}, failed {}, cancelled {} since the start",
            self.jobs_done, self.jobs_failed, self.jobs_cancelled
        )?;
        write!(f, "clips {} of {}", Size(self.clip_bytes), Size(self.clip_bytes_limit))?;
        if self.held_bytes > 0 || self.watched_jobs > 0 {
            write!(
                f,
                "; {} held sealed and {} jobs watched for others",
                Size(self.held_bytes),
                self.watched_jobs
            )?;
        }
        self.audits.fmt(f)?;
        for model in &self.archive {
            write!(f, "\n{model}")?;
        }
        let own = format!("/p2p/{}", self.node);
        for address in &self.addresses {
            write!(f, "\nlistens on {}", address.strip_suffix(&own).unwrap_or(address))?;
        }
        Ok(())
    }
}

impl StatusReport {
    /// Whether others see this node.
    fn fmt_seen(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((ago, seen)) = self.seen.as_ref().filter(|(_, seen)| !seen.is_empty()) else {
            return match self.known_nodes {
                0 => writeln!(f, "no other node is known: whether others reach this one was not asked yet"),
                known => {
                    writeln!(f, "{known} other nodes known; whether they reach this one was not asked yet")
                }
            };
        };
        let reached = seen.iter().filter(|seen| seen.reached).count();
        let quoted = seen.iter().filter(|seen| seen.quoted).count();
        let (asked, ago) = (seen.len(), Span(*ago));
        if reached == 0 {
            write!(f, "{NOT_REACHABLE}: none of {asked} nodes could connect to this one {ago} ago")?;
        } else {
            write!(f, "seen by {reached} of {asked} nodes {ago} ago, {quoted} got a quote")?;
        }
        match seen.iter().find(|seen| !seen.text.is_empty()) {
            Some(seen) => writeln!(f, ": {}", seen.text),
            None => writeln!(f),
        }
    }
}

impl fmt::Display for ArchiveReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.state.as_str() {
            "held" => write!(f, "holds {}", self.name),
            "comes" => write!(f, "fetches {}: {} of {}", self.name, Size(self.done), Size(self.total)),
            _ if self.text.is_empty() => write!(f, "wants {}", self.name),
            _ => write!(f, "wants {}: {}", self.name, self.text),
        }
    }
}

impl AuditsReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::default() {
            return Ok(());
        }
        let looked = self.honest + self.caught + self.could_not_look;
        write!(f, "\naudits of others' jobs: {looked}")?;
        if looked > 0 {
            write!(f, " ({} honest, {} not, {} unclear)", self.honest, self.caught, self.could_not_look)?;
        }
        write!(f, ", {} wait; own jobs looked at by others: {} times", self.waiting, self.shown)
    }
}

impl QuotesReport {
    /// Why this node is idle, or is not.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.asked == 0 {
            return writeln!(f, "no quote was asked in the last {} h", self.hours);
        }
        write!(
            f,
            "in the last {} h: {} quotes asked, {} offered, {} won",
            self.hours, self.asked, self.offered, self.won
        )?;
        if self.expired > 0 {
            write!(f, ", {} ran out", self.expired)?;
        }
        writeln!(f)?;
        for lost in &self.lost {
            let why = match lost.what.as_str() {
                "sooner" => format!(
                    "another was sooner, by {:.0} s on average",
                    self.sooner_by_seconds.unwrap_or_default()
                ),
                "latency" => "another answered sooner".to_owned(),
                "reliability" => "another's jobs have ended well more often".to_owned(),
                "cancelled" => "the artist only asked, or changed their mind".to_owned(),
                _ => "another was chosen".to_owned(),
            };
            writeln!(f, "  lost {}: {why}", lost.count)?;
        }
        for refused in &self.refused {
            writeln!(f, "  refused {}: {}", refused.count, refused.what.replace('_', " "))?;
        }
        for model in &self.unserved {
            writeln!(f, "  sought {} times and not served here: {}", model.count, model.what)?;
        }
        Ok(())
    }
}

impl fmt::Display for JobReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.job, self.state)?;
        if let Some(device) = &self.device {
            write!(f, " on {device}")?;
        }
        if let Some((step, steps)) = self.step {
            write!(f, ", step {step} of {steps}")?;
        }
        if let Some(position) = self.position {
            write!(f, ", {position} before it")?;
        }
        if let Some(eta) = self.eta_seconds {
            write!(f, ", about {eta:.0} s to go")?;
        }
        Ok(())
    }
}

/// Seconds as people say them.
pub(crate) struct Span(pub(crate) u64);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (days, hours, minutes) = (self.0 / 86_400, self.0 / 3_600 % 24, self.0 / 60 % 60);
        match (days, hours, minutes) {
            (0, 0, 0) => write!(f, "{} s", self.0),
            (0, 0, minutes) => write!(f, "{minutes} min"),
            (0, hours, 0) => write!(f, "{hours} h"),
            (0, hours, minutes) => write!(f, "{hours} h {minutes} min"),
            (days, hours, _) => write!(f, "{days} d {hours} h"),
        }
    }
}

/// Bytes in binary units.
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MIB: u64 = 1 << 20;
        const GIB: u64 = 1 << 30;
        match self.0 {
            bytes if bytes >= GIB => write!(f, "{:.1} GiB", bytes as f64 / GIB as f64),
            bytes if bytes >= MIB => write!(f, "{:.1} MiB", bytes as f64 / MIB as f64),
            bytes => write!(f, "{} KiB", bytes.div_ceil(1024)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_and_sizes_read_as_people_say_them() {
        assert_eq!(Span(59).to_string(), "59 s");
        assert_eq!(Span(7_200).to_string(), "2 h");
        assert_eq!(Span(3_700).to_string(), "1 h 1 min");
        assert_eq!(Span(200_000).to_string(), "2 d 7 h");
        assert_eq!(Size(1).to_string(), "1 KiB");
        assert_eq!(Size(3 << 30).to_string(), "3.0 GiB");
    }
}
