//! Everything that the command prints, in one place: data on standard output, words on standard error.
//!
//! On a terminal a job's progress is one line that moves; in a pipe it is plain lines. With `--json` each record is one
//! line of JSON on standard output that begins `{"schema":1`.
#![expect(clippy::print_stderr, reason = "this module is where words are printed")]

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::session::Event;

pub mod many;
pub mod table;

/// The version of every JSON record.
pub const SCHEMA: u32 = 1;
/// Share of the steps, in percent, after which a plain line tells of them again.
const PLAIN_STEP_PERCENT: u32 = 10;

/// Where and how things are printed.
#[derive(Debug)]
pub struct Output {
    json: bool,
    quiet: bool,
    colour: bool,
    moving: bool,
}

impl Output {
    /// Output as the flags and the terminal say. `NO_COLOR` is heeded.
    #[must_use]
    pub fn new(json: bool, quiet: bool) -> Self {
        let terminal = io::stderr().is_terminal();
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Self { json, quiet, colour: terminal && !plain, moving: terminal && !json && !quiet && !dumb }
    }

    /// Whether records are JSON.
    #[must_use]
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// A line of data: to standard output, unless that is JSON.
    pub fn line(&self, text: &str) {
        if !self.json {
            self.bytes(format!("{}\n", printable(text)).as_bytes());
        }
    }

    /// A record for programs: one line of JSON, if that was asked for.
    pub fn record<T: Serialize>(&self, value: &T) {
        if !self.json {
            return;
        }
        let json = serde_json::to_string(value).expect("invariant: records have text keys");
        let fields = json.strip_prefix('{').expect("invariant: a record is an object");
        let comma = if fields == "}" { "" } else { "," };
        self.bytes(format!("{{\"schema\":{SCHEMA}{comma}{fields}\n").as_bytes());
    }

    /// Bytes to standard output. A reader that has gone is no error: there is nobody to tell.
    pub fn bytes(&self, bytes: &[u8]) {
        let mut out = io::stdout().lock();
        let _ = out.write_all(bytes).and_then(|()| out.flush());
    }

    /// A heading of data, bold where that can be seen.
    pub fn heading(&self, text: &str) {
        let bold = self.colour && io::stdout().is_terminal();
        if bold && !self.json {
            self.bytes(format!("\u{1b}[1m{}\u{1b}[0m\n", printable(text)).as_bytes());
        } else {
            self.line(text);
        }
    }

    /// Words for people.
    pub fn words(&self, text: &str) {
        if !self.quiet {
            eprintln!("{}", printable(text));
        }
    }

    /// What went wrong.
    pub fn error(&self, text: &str) {
        let (red, plain) = if self.colour { ("\u{1b}[31m", "\u{1b}[0m") } else { ("", "") };
        eprintln!("{red}error:{plain} {}", printable(text));
    }

    /// Whether somebody can be asked.
    #[must_use]
    pub fn can_ask(&self) -> bool {
        !self.json && !self.quiet && io::stdin().is_terminal() && io::stderr().is_terminal()
    }

    /// What renders a job's events.
    #[must_use]
    pub fn progress(&self) -> Progress<'_> {
        let bar = self.moving.then(|| {
            let bar = ProgressBar::new(0);
            bar.enable_steady_tick(Duration::from_millis(120));
            bar.set_style(waiting());
            bar
        });
        Progress { out: self, bar, told_percent: 0, declined: Vec::new() }
    }
}

/// Renders a job's events.
#[derive(Debug)]
pub struct Progress<'a> {
    out: &'a Output,
    bar: Option<ProgressBar>,
    told_percent: u32,
    /// Who declined, until another is chosen: if nobody is, the error at the end says it all. As many as were asked.
    declined: Vec<String>,
}

impl Progress<'_> {
    /// Shows an event.
    pub fn show(&mut self, event: &Event) {
        if self.out.json {
            self.out.record(event);
        }
        match event {
            Event::Declined { .. } => self.declined.push(event.to_string()),
            Event::Chosen { .. } if !self.out.json => {
                for declined in std::mem::take(&mut self.declined) {
                    self.aside(|| self.out.words(&declined));
                }
            }
            _ => {}
        }
        match &self.bar {
            Some(bar) => move_bar(bar, event),
            // With JSON on standard output, words about progress would only say it twice.
            None if self.out.json => {}
            None => self.tell(event),
        }
    }

    /// Takes the moving line away.
    pub fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    /// Runs this while the moving line is hidden.
    pub fn aside(&self, print: impl FnOnce()) {
        match &self.bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }

    fn tell(&mut self, event: &Event) {
        match event {
            event if is_for_programs(event) => return,
            Event::Transfer { done, len } if done < len => return,
            Event::Step { done, total, .. } => {
                let percent = done * 100 / (*total).max(1);
                let is_news = percent >= self.told_percent + PLAIN_STEP_PERCENT || done == total;
                if !is_news {
                    return;
                }
                self.told_percent = percent;
            }
            _ => {}
        }
        self.out.words(&event.to_string());
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        self.clear();
    }
}

fn move_bar(bar: &ProgressBar, event: &Event) {
    match event {
        Event::Step { done, total, eta } => {
            bar.set_style(counting("steps"));
            bar.set_length(u64::from(*total));
            bar.set_position(u64::from(*done));
            bar.set_message(format!("about {eta} left"));
        }
        Event::Transfer { done, len } => {
            bar.set_style(transferring());
            bar.set_length(*len);
            bar.set_position(*done);
            bar.set_message("");
        }
        Event::Queued { .. } | Event::Loading | Event::Encoding | Event::AwaitingInputs { .. } => {
            bar.set_style(waiting());
            bar.set_message(printable(&event.to_string()).into_owned());
        }
        event if is_for_programs(event) => {}
        other => bar.println(printable(&other.to_string())),
    }
}

/// A text without what would move the cursor, change colours or turn the direction of writing: names and reasons come from
/// others.
fn printable(text: &str) -> Cow<'_, str> {
    let is_directing = |c: char| matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let is_harmless = |c: char| matches!(c, '\n' | '\t') || !(c.is_control() || is_directing(c));
    if text.chars().all(is_harmless) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.chars().map(|c| if is_harmless(c) { c } else { char::REPLACEMENT_CHARACTER }).collect())
}

/// What a person need not read: pictures, and reasons that the error at the end repeats if it comes to one.
fn is_for_programs(event: &Event) -> bool {
    matches!(
        event,
        Event::Preview { .. } | Event::Unreachable { .. } | Event::Reached { .. } | Event::Declined { .. }
    )
}

fn waiting() -> ProgressStyle {
    style("{spinner} {msg}")
}

fn counting(what: &str) -> ProgressStyle {
    style(&format!("{{wide_bar}} {{pos}}/{{len}} {what} {{msg}}"))
}

fn transferring() -> ProgressStyle {
    style("{wide_bar} {bytes}/{total_bytes} {bytes_per_sec}")
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_steer_the_terminal() {
        assert_eq!(printable("attic\tmärn 北\nnext"), "attic\tmärn 北\nnext");
        assert_eq!(
            printable("a\u{1b}[31mb\u{7}\u{9b}2J\r\u{202e}c"),
            "a\u{fffd}[31mb\u{fffd}\u{fffd}2J\u{fffd}\u{fffd}c"
        );
    }
}
