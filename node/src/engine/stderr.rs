//! What a worker prints: logged line by line, without the words of the artist, and its end kept for the cause of a crash.
//!
//! Nobody knows what a library prints, so every line is compared with the prompt of the running job, in runs of
//! [`WINDOW`] letters and digits; a line that holds such a run is replaced as a whole.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt};

/// Lines kept for the cause of a crash: a backtrace may follow the line that names it.
const TAIL_LINES: usize = 128;
/// Bytes of a line that are kept.
const MAX_LINE: usize = 512;
/// Lines logged for each job; what a worker prints beyond is dropped.
const MAX_LOGGED: u32 = 200;
/// Letters and digits in a row that give a prompt away.
const WINDOW: usize = 12;

/// What a worker printed, shared between the task that reads it and the supervisor.
#[derive(Debug, Clone, Default)]
pub(super) struct Printed(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    tail: VecDeque<String>,
    secrets: Secrets,
    logged: u32,
}

impl Printed {
    /// From now on these texts must not be logged.
    pub(super) fn hide(&self, texts: &[&str]) {
        let mut state = self.lock();
        state.secrets = Secrets::of(texts);
        state.logged = 0;
    }

    /// Whether one of the last lines contains `text`.
    pub(super) fn tail_contains(&self, text: &str) -> bool {
        self.lock().tail.iter().any(|line| line.contains(text))
    }

    fn take(&self, device: &str, line: &[u8]) {
        let line = String::from_utf8_lossy(line);
        let line = line.trim_end();
        if line.is_empty() {
            return;
        }
        let mut state = self.lock();
        let line = if state.secrets.are_in(line) { "(a line with the job's prompt)" } else { line };
        if state.tail.len() == TAIL_LINES {
            state.tail.pop_front();
        }
        state.tail.push_back(line.to_owned());
        state.logged += 1;
        if state.logged <= MAX_LOGGED {
            tracing::debug!(target: "kinoflock::worker", device, line);
        } else if state.logged == MAX_LOGGED + 1 {
            tracing::warn!(target: "kinoflock::worker", device, limit = MAX_LOGGED, "worker prints too much");
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads lines until the end of the pipe.
pub(super) async fn read(mut pipe: impl AsyncRead + Unpin, device: String, printed: Printed) {
    let mut line = Vec::with_capacity(MAX_LINE);
    let mut buffer = [0; 4096];
    loop {
        let read = match pipe.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(read) => read,
        };
        for &byte in &buffer[..read] {
            if byte == b'\n' {
                printed.take(&device, &line);
                line.clear();
            } else if line.len() < MAX_LINE {
                line.push(byte);
            }
        }
    }
    printed.take(&device, &line);
}

/// Texts by their runs of letters and digits.
#[derive(Debug, Default)]
struct Secrets {
    runs: BTreeSet<Vec<char>>,
    short: Vec<Vec<char>>,
}

impl Secrets {
    fn of(texts: &[&str]) -> Self {
        let mut secrets = Self::default();
        // A panic's message quotes with escapes, whose letters come in between.
        for text in texts.iter().flat_map(|text| [(*text).to_owned(), text.escape_debug().to_string()]) {
            let letters = letters(&text);
            if letters.len() >= WINDOW {
                secrets.runs.extend(letters.windows(WINDOW).map(<[char]>::to_vec));
            } else if !letters.is_empty() {
                secrets.short.push(letters);
            }
        }
        secrets
    }

    fn are_in(&self, line: &str) -> bool {
        let letters = letters(line);
        letters.windows(WINDOW).any(|run| self.runs.contains(run))
            || self.short.iter().any(|text| letters.windows(text.len()).any(|run| run == text))
    }
}

fn letters(text: &str) -> Vec<char> {
    text.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_line_with_words_of_the_prompt_is_hidden_however_it_is_quoted() {
        let secrets = Secrets::of(&["A red circle,\n\"drifting\" left", "rain"]);
        assert!(secrets.are_in("panicked at 'a RED circle,\\n\\\"drifting'"));
        assert!(secrets.are_in("token: rain"));
        assert!(!secrets.are_in("CUDA error: a red light"));
        assert!(!Secrets::of(&["", "!?"]).are_in("anything"));
    }

    #[tokio::test]
    async fn lines_are_cut_and_the_last_ones_kept() {
        let printed = Printed::default();
        let mut text = "x".repeat(5000);
        for i in 0..200 {
            text.push_str(&format!("\nline {i}"));
        }
        read(text.as_bytes(), "cpu".to_owned(), printed.clone()).await;
        assert!(printed.tail_contains("line 199"));
        assert!(!printed.tail_contains("line 71"));
        assert!(!printed.tail_contains("xxx"));
    }
}
