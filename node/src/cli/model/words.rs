//! How sizes and longer texts are written.

/// Columns of a line.
const COLUMNS: usize = 80;

/// Bytes for people: three digits at most, in powers of ten as disks are sold.
pub(super) fn size(bytes: u64) -> String {
    let (mut value, mut unit) = (bytes as f64, "B");
    for next in ["kB", "MB", "GB", "TB"] {
        if value < 999.5 {
            break;
        }
        (value, unit) = (value / 1000.0, next);
    }
    if unit == "B" || value >= 99.95 { format!("{value:.0} {unit}") } else { format!("{value:.1} {unit}") }
}

/// A text under a heading, in as many lines as it needs. Control characters, which may come from others, are dropped.
pub(super) fn entry(heading: &str, text: &str) -> String {
    const INDENT: usize = 17;
    let mut lines = vec![format!("  {heading:<width$}", width = INDENT - 2)];
    let clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let mut column = INDENT;
    for word in clean.split_whitespace() {
        let wide = word.chars().count();
        if column > INDENT && column + 1 + wide > COLUMNS {
            lines.push(" ".repeat(INDENT));
            column = INDENT;
        }
        let line = lines.last_mut().expect("invariant: there is a first line");
        if column > INDENT {
            line.push(' ');
            column += 1;
        }
        line.push_str(word);
        column += wide;
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1_300, "1.3 kB"),
            (99_960_000, "100 MB"),
            (28_900_000_000, "28.9 GB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn long_texts_stay_within_a_terminals_width() {
        let text = "a paper boat in the rain ".repeat(12) + "\u{1b}[31m";
        let written = entry("licence", &text);
        assert!(written.lines().all(|line| line.chars().count() <= COLUMNS), "{written}");
        assert!(written.lines().count() > 3 && !written.contains('\u{1b}'), "{written}");
        assert!(written.starts_with("  licence        a paper"), "{written}");
    }
}
