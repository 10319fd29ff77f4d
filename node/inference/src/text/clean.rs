//! A prompt made plain before it is tokenized: `ftfy.fix_text` and runs of white space to one space, as CLIP's tokenizer
//! has it; and for Wan's reference HTML references replaced twice more in between.
//!
//! Of ftfy 6 there is here what changes the tokens of a text that was written as it should be: HTML references (not in a
//! line from which on a `<` stands), C1 controls that are windows-1252, Latin ligatures, wide and narrow forms, curled quotes, terminal escapes, control
//! characters, Unicode form C, until nothing changes any more. Not here: the repair of text that was decoded with the
//! wrong encoding ("mojibake") and of lone surrogates, which a Rust string cannot hold; and names in capitals that HTML
//! writes small (`&EACUTE;`). Such text goes to the tokenizer as it stands.

use tokenizers::NormalizedString;

use super::entities::{unescape, windows};

/// A prompt as Wan's text encoder was trained to see it.
#[must_use]
pub fn clean(prompt: &str) -> String {
    collapse_space(&unescape(&unescape(&fix_text(prompt))))
}

/// A text as it was meant, as far as that is seen.
#[must_use]
pub fn fix_text(text: &str) -> String {
    let mut may_unescape = true;
    text.split_inclusive('\n')
        .map(|line| {
            may_unescape = may_unescape && !line.contains('<');
            fix(line, may_unescape)
        })
        .collect()
}

/// Runs of white space become one space, and none stays at the ends.
#[must_use]
pub fn collapse_space(text: &str) -> String {
    text.split(is_space).filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// What Python's `\s` matches: white space, and the four separators among the control characters.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn fix(line: &str, may_unescape: bool) -> String {
    // Each round that changes something makes a reference or a character plainer.
    const MOST_ROUNDS: usize = 64;
    let mut text = line.to_owned();
    for _ in 0..MOST_ROUNDS {
        let read = if may_unescape { unescape_whole(&text) } else { text.clone() };
        let plain: String = without_escapes(&widened(&read)).chars().filter(|c| !is_control(*c)).collect();
        let mut composed = NormalizedString::from(plain);
        composed.nfc();
        if composed.get() == text {
            break;
        }
        text = composed.get().to_owned();
    }
    text
}

/// Replaces references that end in a semicolon.
fn unescape_whole(text: &str) -> String {
    const MOST: usize = 24;
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let body = rest[1..].strip_prefix('#').unwrap_or(&rest[1..]);
        let length = body.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(body.len());
        let end = rest.len() - body.len() + length;
        if (1..=MOST).contains(&length) && rest[end..].starts_with(';') {
            let read = unescape(&rest[..=end]);
            // A known beginning of an unknown name is not meant.
            out.push_str(if read.ends_with(';') { &rest[..=end] } else { &read });
            rest = &rest[end + 1..];
        } else {
            out.push('&');
            rest = &rest[1..];
        }
    }
    out.push_str(rest);
    out
}

/// C1 controls, ligatures, wide and narrow forms, quotes, line breaks.
fn widened(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\u{2bc}' | '\u{2018}'..='\u{201b}' => out.push('\''),
            '\u{201c}'..='\u{201f}' => out.push('"'),
            '\u{3000}' => out.push(' '),
            '\u{80}'..='\u{9f}' => out.push(windows(c)),
            '\r' | '\u{2028}' | '\u{2029}' => out.push('\n'),
            '\u{ff01}'..='\u{ffef}' => {
                let mut form = NormalizedString::from(c.to_string());
                form.nfkc();
                out.push_str(form.get());
            }
            _ => match LIGATURES.iter().find(|(ligature, _)| *ligature == c) {
                Some((_, letters)) => out.push_str(letters),
                None => out.push(c),
            },
        }
    }
    out
}

const LIGATURES: [(char, &str); 22] = [
    ('\u{132}', "IJ"),
    ('\u{133}', "ij"),
    ('\u{149}', "\u{2bc}n"),
    ('\u{1c4}', "D\u{17d}"),
    ('\u{1c5}', "D\u{17e}"),
    ('\u{1c6}', "d\u{17e}"),
    ('\u{1c7}', "LJ"),
    ('\u{1c8}', "Lj"),
    ('\u{1c9}', "lj"),
    ('\u{1ca}', "NJ"),
    ('\u{1cb}', "Nj"),
    ('\u{1cc}', "nj"),
    ('\u{1f1}', "DZ"),
    ('\u{1f2}', "Dz"),
    ('\u{1f3}', "dz"),
    ('\u{fb00}', "ff"),
    ('\u{fb01}', "fi"),
    ('\u{fb02}', "fl"),
    ('\u{fb03}', "ffi"),
    ('\u{fb04}', "ffl"),
    ('\u{fb05}', "\u{17f}t"),
    ('\u{fb06}', "st"),
];

/// Without the sequences that colour a terminal's text: escape, `[`, numbers, a letter.
fn without_escapes(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("\u{1b}[") {
        let body = &rest[at + 2..];
        let length = body.find(|c: char| !(c.is_numeric() || c == ';')).unwrap_or(body.len());
        out.push_str(&rest[..at]);
        if body[length..].starts_with(|c: char| c.is_ascii_alphabetic()) {
            rest = &body[length + 1..];
        } else {
            out.push_str("\u{1b}[");
            rest = body;
        }
    }
    out.push_str(rest);
    out
}

fn is_control(c: char) -> bool {
    matches!(c,
        '\0'..='\u{8}' | '\u{b}' | '\u{e}'..='\u{1f}' | '\u{7f}' | '\u{206a}'..='\u{206f}' | '\u{feff}'
        | '\u{fff9}'..='\u{fffc}')
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the reference's `prompt_clean` gives with ftfy 6.3.1.
    #[test]
    fn prompts_become_what_the_reference_makes_of_them() {
        for (prompt, want) in CASES {
            assert_eq!(clean(prompt), *want, "{prompt:?}");
        }
    }

    const CASES: &[(&str, &str)] = &[
        ("  A red dog,\n\t running\u{a0}fast \r\n", "A red dog, running fast"),
        ("\u{201c}Hello\u{201d} \u{2018}world\u{2019} \u{2bc}\u{201f}x", "\"Hello\" 'world' '\"x"),
        ("of\u{fb01}ce \u{fb02}ow \u{149} \u{1c6} \u{fb05}", "office flow 'n d\u{17e} \u{17f}t"),
        (
            "\u{ff57}\u{ff49}\u{ff44}\u{ff45}\u{3000}\u{ff76}\u{ff9e}\u{ff6f}\u{ffe0} \u{ffe8}",
            "wide \u{30ac}\u{30c3}\u{a2} \u{2502}",
        ),
        ("a &amp;amp;amp;lt; b", "a < b"),
        ("x < y &amp;amp;amp;lt; z", "x < y &amp;lt; z"),
        ("line &lt;\n a < b &amp;amp;lt;\n &amp;amp;lt;", "line < a < b &lt; &lt;"),
        ("cafe\u{301} \u{212b}", "caf\u{e9} \u{c5}"),
        ("\u{1b}[36;44mblue\u{1b}[0m \u{1b}[x3", "blue 3"),
        ("nul\u{0}bell\u{7}\u{1c}fs\u{7f}\u{206a}\u{feff}bom\u{fffc}", "nulbellfsbom"),
        ("&notit; &copy2024 &ampersand;", "\u{ac}it; \u{a9}2024 &ersand;"),
        (
            "tabs\u{b}vt\u{c}ff\u{85}nel\u{2028}ls\u{2029}ps\u{3000}\u{1680}\u{200b}.",
            "tabsvt ff\u{2026}nel ls ps \u{200b}.",
        ),
        ("", ""),
        ("   ", ""),
        (
            "\u{4e00}\u{53ea}\u{7ea2}\u{8272}\u{7684}\u{72d7}\u{ff0c}\u{5728}\u{5c71}\u{4e0a}\u{8dd1}\u{3002}",
            "\u{4e00}\u{53ea}\u{7ea2}\u{8272}\u{7684}\u{72d7},\u{5728}\u{5c71}\u{4e0a}\u{8dd1}\u{3002}",
        ),
        ("AT&T R&D; &nbsp;x&nbsp;", "AT&T R&D; x"),
    ];
}
