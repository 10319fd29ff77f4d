//! The progress of many jobs at once: on a terminal a moving line for each, in a pipe plain lines that begin with whose
//! they are.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar};
use kinoflock_protocol::NodeId;
use serde::Serialize;

use super::{Output, PLAIN_STEP_PERCENT, is_for_programs, style};
use crate::route::called;
use crate::session::Event;

/// Whose event it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Label {
    /// The variation with this seed; as text, because it has 64 bits.
    Seed(String),
    /// The line with this number of a batch.
    Line(usize),
    /// The clip with this number of a walk, from 0.
    Clip(usize),
}

impl std::fmt::Display for Label {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Seed(seed) => write!(f, "seed {seed}"),
            Self::Line(line) => write!(f, "line {line}"),
            Self::Clip(clip) => write!(f, "clip {clip}"),
        }
    }
}

#[derive(Serialize)]
struct Of<'a> {
    of: &'a Label,
    #[serde(flatten)]
    event: &'a Event,
}

/// Renders the events of many jobs.
#[derive(Debug)]
pub struct Many<'a> {
    out: &'a Output,
    labels: Vec<Label>,
    width: usize,
    moving: Option<MultiProgress>,
    /// The lines of those that are under way.
    bars: BTreeMap<usize, ProgressBar>,
    told_percent: BTreeMap<usize, u32>,
    /// Nodes whose promises were told in full.
    known: BTreeSet<NodeId>,
}

impl Output {
    /// What renders the events of jobs with these labels.
    #[must_use]
    pub fn many(&self, labels: Vec<Label>) -> Many<'_> {
        let width = labels.iter().map(|label| label.to_string().len()).max().unwrap_or(0);
        let moving = self.moving.then(MultiProgress::new);
        let (bars, told_percent, known) = Default::default();
        Many { out: self, labels, width, moving, bars, told_percent, known }
    }
}

impl Many<'_> {
    /// Shows an event of one of them.
    pub fn show(&mut self, index: usize, event: &Event) {
        let of = self.labels[index].clone();
        if self.out.json {
            return self.out.record(&Of { of: &of, event });
        }
        if is_for_programs(event) {
            return;
        }
        let text = self.text(index, event);
        match (&self.moving, event) {
            (None, _) => self.tell(index, event, &text),
            (
                Some(_),
                Event::Step { .. }
                | Event::Transfer { .. }
                | Event::Queued { .. }
                | Event::Loading
                | Event::Encoding
                | Event::AwaitingInputs { .. }
                | Event::Accepted { .. },
            ) => self.advance(index, event, text),
            (Some(_), Event::Made { .. } | Event::Verified { .. } | Event::Answered) => {}
            (Some(moving), _) => {
                // A terminal that is gone is no reason to stop.
                let _ = moving.println(format!("{of}: {text}"));
            }
        }
    }

    /// One of them has come to its end.
    pub fn end(&mut self, index: usize) {
        if let Some(bar) = self.bars.remove(&index) {
            bar.finish_and_clear();
        }
        self.told_percent.remove(&index);
    }

    /// Takes all moving lines away.
    pub fn clear(&mut self) {
        for (_, bar) in std::mem::take(&mut self.bars) {
            bar.finish_and_clear();
        }
    }

    /// Runs this while the moving lines are hidden.
    pub fn aside<T>(&self, print: impl FnOnce() -> T) -> T {
        match &self.moving {
            Some(moving) => moving.suspend(print),
            None => print(),
        }
    }

    /// What a node promises is told in full once, and who has which job every time.
    fn text(&mut self, index: usize, event: &Event) -> String {
        match event {
            Event::Chosen { node, name, position, eta, sees, seed, custodians, auditors, .. }
                if !self.known.insert(*node) =>
            {
                let seed = match &self.labels[index] {
                    Label::Seed(_) => String::new(),
                    Label::Line(_) | Label::Clip(_) => format!(", seed {seed}"),
                };
                // They could read the prompt too: who they are is told every time.
                let watched = match custodians.join(" and ") {
                    nobody if nobody.is_empty() => nobody,
                    names => format!("; watched over by {names}, who could read the prompt too"),
                };
                let audited = match auditors.join(" or ") {
                    nobody if nobody.is_empty() => nobody,
                    names => format!("; if it is audited, {names} will see the prompt and some latents"),
                };
                format!(
                    "node {} will make it too and see {sees}{seed}: {position} ahead, about {eta}{watched}{audited}",
                    called(name, node)
                )
            }
            other => other.to_string(),
        }
    }

    fn tell(&mut self, index: usize, event: &Event, text: &str) {
        match event {
            Event::Transfer { done, len } if done < len => return,
            Event::Step { done, total, .. } => {
                let percent = done * 100 / (*total).max(1);
                let told = self.told_percent.entry(index).or_default();
                if percent < *told + PLAIN_STEP_PERCENT && done != total {
                    return;
                }
                *told = percent;
            }
            _ => {}
        }
        let label = &self.labels[index];
        for line in text.lines() {
            self.out.words(&format!("{label}: {line}"));
        }
    }

    fn advance(&mut self, index: usize, event: &Event, text: String) {
        let bar = self.bar(index);
        match event {
            Event::Step { done, total, eta } => {
                bar.set_style(style("{prefix}  {wide_bar} {pos}/{len} steps {msg}"));
                bar.set_length(u64::from(*total));
                bar.set_position(u64::from(*done));
                bar.set_message(format!("about {eta} left"));
            }
            Event::Transfer { done, len } => {
                bar.set_style(style("{prefix}  {wide_bar} {bytes}/{total_bytes}"));
                bar.set_length(*len);
                bar.set_position(*done);
            }
            _ => {
                bar.set_style(style("{prefix}  {spinner} {msg}"));
                bar.set_message(text);
            }
        }
    }

    fn bar(&mut self, index: usize) -> ProgressBar {
        if let Some(bar) = self.bars.get(&index) {
            return bar.clone();
        }
        let mut bar =
            ProgressBar::new(0).with_prefix(format!("{:<1$}", self.labels[index].to_string(), self.width));
        if let Some(moving) = &self.moving {
            // In the order of the jobs, whatever the order in which they begin.
            bar = match self.bars.range(..index).next_back() {
                Some((_, before)) => moving.insert_after(before, bar),
                None => moving.insert(0, bar),
            };
        }
        bar.enable_steady_tick(Duration::from_millis(120));
        self.bars.insert(index, bar.clone());
        bar
    }
}

impl Drop for Many<'_> {
    fn drop(&mut self) {
        self.clear();
    }
}
