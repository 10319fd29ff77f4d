//! Text as the web leaves it, put in order before a tokenizer reads it: what `ftfy.fix_text` does to text that is not
//! mis-decoded.
//!
//! In its order: HTML entities (unless a `<` is there), terminal colour codes, Latin ligatures, full-width and half-width
//! forms, curled quotes, control characters, NFC. Left out: text that was decoded in the wrong encoding stays as it is,
//! and of HTML's names those of Latin-1 letters, quotes, dashes and markup are known.

use tokenizers::NormalizedString;

/// Puts a text in order.
#[must_use]
pub fn fix_text(text: &str) -> String {
    const MOST_ROUNDS: usize = 8;
    let mut fixed = text.to_owned();
    for _ in 0..MOST_ROUNDS {
        let next = fix_once(&fixed);
        if next == fixed {
            break;
        }
        fixed = next;
    }
    fixed
}

/// Runs of white space become one space, and none stays at the ends.
#[must_use]
pub fn collapse_space(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// HTML entities, by number or name, become what they stand for; what is not known stays.
#[must_use]
pub fn unescape_html(text: &str) -> String {
    const LONGEST: usize = 32;
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let end = rest.bytes().take(LONGEST).position(|byte| byte == b';');
        match end.and_then(|end| Some((end, entity(&rest[1..end])?))) {
            Some((end, meant)) => {
                out.push(meant);
                rest = &rest[end + 1..];
            }
            None => {
                out.push('&');
                rest = &rest[1..];
            }
        }
    }
    out.push_str(rest);
    out
}

fn fix_once(text: &str) -> String {
    let text = if text.contains('<') { text.to_owned() } else { unescape_html(text) };
    let text = without_colour_codes(&text);
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\u{2bc}' | '\u{2018}'..='\u{201b}' => out.push('\''),
            '\u{201c}'..='\u{201f}' => out.push('"'),
            '\u{3000}' => out.push(' '),
            '\u{ff01}'..='\u{ffef}' => out.push_str(&compatible(character)),
            _ if is_control(character) => {}
            _ => match ligature(character) {
                Some(letters) => out.push_str(letters),
                None => out.push(character),
            },
        }
    }
    let mut normalized = NormalizedString::from(out);
    normalized.nfc();
    normalized.get().to_owned()
}

fn compatible(character: char) -> String {
    let mut normalized = NormalizedString::from(character.to_string());
    normalized.nfkc();
    normalized.get().to_owned()
}

/// Characters that show nothing, tab and line ends aside.
fn is_control(character: char) -> bool {
    matches!(
        character,
        '\0'..='\u{8}' | '\u{b}' | '\u{e}'..='\u{1f}' | '\u{7f}' | '\u{206a}'..='\u{206f}' | '\u{feff}'
            | '\u{fff9}'..='\u{fffc}'
    )
}

/// Without `ESC [ digits letter`.
fn without_colour_codes(text: &str) -> String {
    let mut parts = text.split("\u{1b}[");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let after = part.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';');
        match after.strip_prefix(|c: char| c.is_ascii_alphabetic()) {
            Some(after) => out.push_str(after),
            None => {
                out.push_str("\u{1b}[");
                out.push_str(part);
            }
        }
    }
    out
}

fn ligature(character: char) -> Option<&'static str> {
    Some(match character {
        'Ĳ' => "IJ",
        'ĳ' => "ij",
        'ŉ' => "ʼn",
        'Ǆ' => "DŽ",
        'ǅ' => "Dž",
        'ǆ' => "dž",
        'Ǉ' => "LJ",
        'ǈ' => "Lj",
        'ǉ' => "lj",
        'Ǌ' => "NJ",
        'ǋ' => "Nj",
        'ǌ' => "nj",
        'Ǳ' => "DZ",
        'ǲ' => "Dz",
        'ǳ' => "dz",
        'ﬀ' => "ff",
        'ﬁ' => "fi",
        'ﬂ' => "fl",
        'ﬃ' => "ffi",
        'ﬄ' => "ffl",
        'ﬅ' => "ſt",
        'ﬆ' => "st",
        _ => return None,
    })
}

/// What stands between `&` and `;`.
fn entity(name: &str) -> Option<char> {
    if let Some(number) = name.strip_prefix('#') {
        let code = match number.strip_prefix(['x', 'X']) {
            Some(hex) => u32::from_str_radix(hex, 16),
            None => number.parse(),
        };
        return code.ok().filter(|&code| code != 0).and_then(char::from_u32);
    }
    /// From U+00A0 to U+00FF, in order.
    const LATIN_1: &str = "nbsp iexcl cent pound curren yen brvbar sect uml copy ordf laquo not shy reg macr deg \
        plusmn sup2 sup3 acute micro para middot cedil sup1 ordm raquo frac14 frac12 frac34 iquest Agrave Aacute Acirc \
        Atilde Auml Aring AElig Ccedil Egrave Eacute Ecirc Euml Igrave Iacute Icirc Iuml ETH Ntilde Ograve Oacute Ocirc \
        Otilde Ouml times Oslash Ugrave Uacute Ucirc Uuml Yacute THORN szlig agrave aacute acirc atilde auml aring \
        aelig ccedil egrave eacute ecirc euml igrave iacute icirc iuml eth ntilde ograve oacute ocirc otilde ouml \
        divide oslash ugrave uacute ucirc uuml yacute thorn yuml";
    Some(match name {
        "amp" | "AMP" => '&',
        "lt" | "LT" => '<',
        "gt" | "GT" => '>',
        "quot" | "QUOT" => '"',
        "apos" => '\'',
        "lsquo" => '\u{2018}',
        "rsquo" => '\u{2019}',
        "ldquo" => '\u{201c}',
        "rdquo" => '\u{201d}',
        "ndash" => '\u{2013}',
        "mdash" => '\u{2014}',
        "hellip" => '\u{2026}',
        "bull" => '\u{2022}',
        "euro" => '\u{20ac}',
        "trade" => '\u{2122}',
        _ => {
            let place = LATIN_1.split_ascii_whitespace().position(|known| known == name)?;
            char::from_u32(0xa0 + place as u32)?
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ligatures_widths_quotes_and_controls_become_plain() {
        assert_eq!(fix_text("ﬁre ｗｉｄｅ　“so” \u{7}it’s"), "fire wide \"so\" it's");
        assert_eq!(fix_text("e\u{301}t\u{e9}"), "\u{e9}t\u{e9}");
        assert_eq!(fix_text("ﾊﾝｶｸ"), "ハンカク");
        assert_eq!(fix_text("\u{1b}[31mred\u{1b}[0m \u{1b}[x"), "red ");
    }

    #[test]
    fn entities_become_characters_and_what_is_none_stays() {
        assert_eq!(
            unescape_html("a &amp; b &#233;&#xe9;&eacute;&yuml; & c &nothing; &"),
            "a & b éééÿ & c &nothing; &"
        );
        assert_eq!(fix_text("&amp;lt;"), "<");
        assert_eq!(fix_text("1 < 2 &amp; 3"), "1 < 2 &amp; 3");
    }

    #[test]
    fn space_is_collapsed() {
        assert_eq!(collapse_space(" a\t\n b\u{a0}c "), "a b c");
    }
}
