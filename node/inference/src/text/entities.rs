//! Character references of HTML in a text: `&amp;`, `&#233;`, `&#xe9;`.
//!
//! As the HTML standard reads them: the longest name that is known, and without the semicolon those names that HTML had
//! before 4.0. Known are the names of HTML 4 and `apos`; HTML 5 has some 2000 more, mathematical signs for the most part,
//! which are left as they stand.

/// Names that need no semicolon, with their code points.
const LEGACY: &str = "\
    AElig=c6 AMP=26 Aacute=c1 Acirc=c2 Agrave=c0 Aring=c5 Atilde=c3 Auml=c4 COPY=a9 Ccedil=c7 ETH=d0 \
    Eacute=c9 Ecirc=ca Egrave=c8 Euml=cb GT=3e Iacute=cd Icirc=ce Igrave=cc Iuml=cf LT=3c Ntilde=d1 \
    Oacute=d3 Ocirc=d4 Ograve=d2 Oslash=d8 Otilde=d5 Ouml=d6 QUOT=22 REG=ae THORN=de Uacute=da Ucirc=db \
    Ugrave=d9 Uuml=dc Yacute=dd aacute=e1 acirc=e2 acute=b4 aelig=e6 agrave=e0 amp=26 aring=e5 \
    atilde=e3 auml=e4 brvbar=a6 ccedil=e7 cedil=b8 cent=a2 copy=a9 curren=a4 deg=b0 divide=f7 eacute=e9 \
    ecirc=ea egrave=e8 eth=f0 euml=eb frac12=bd frac14=bc frac34=be gt=3e iacute=ed icirc=ee iexcl=a1 \
    igrave=ec iquest=bf iuml=ef laquo=ab lt=3c macr=af micro=b5 middot=b7 nbsp=a0 not=ac ntilde=f1 \
    oacute=f3 ocirc=f4 ograve=f2 ordf=aa ordm=ba oslash=f8 otilde=f5 ouml=f6 para=b6 plusmn=b1 pound=a3 \
    quot=22 raquo=bb reg=ae sect=a7 shy=ad sup1=b9 sup2=b2 sup3=b3 szlig=df thorn=fe times=d7 uacute=fa \
    ucirc=fb ugrave=f9 uml=a8 uuml=fc yacute=fd yen=a5 yuml=ff\
    ";

/// Names that need one.
const OTHERS: &str = "\
    Alpha=391 Beta=392 Chi=3a7 Dagger=2021 Delta=394 Epsilon=395 Eta=397 Gamma=393 Iota=399 Kappa=39a \
    Lambda=39b Mu=39c Nu=39d OElig=152 Omega=3a9 Omicron=39f Phi=3a6 Pi=3a0 Prime=2033 Psi=3a8 Rho=3a1 \
    Scaron=160 Sigma=3a3 Tau=3a4 Theta=398 Upsilon=3a5 Xi=39e Yuml=178 Zeta=396 alefsym=2135 alpha=3b1 \
    and=2227 ang=2220 apos=27 asymp=2248 bdquo=201e beta=3b2 bull=2022 cap=2229 chi=3c7 circ=2c6 \
    clubs=2663 cong=2245 crarr=21b5 cup=222a dArr=21d3 dagger=2020 darr=2193 delta=3b4 diams=2666 \
    empty=2205 emsp=2003 ensp=2002 epsilon=3b5 equiv=2261 eta=3b7 euro=20ac exist=2203 fnof=192 \
    forall=2200 frasl=2044 gamma=3b3 ge=2265 hArr=21d4 harr=2194 hearts=2665 hellip=2026 image=2111 \
    infin=221e int=222b iota=3b9 isin=2208 kappa=3ba lArr=21d0 lambda=3bb lang=27e8 larr=2190 \
    lceil=2308 ldquo=201c le=2264 lfloor=230a lowast=2217 loz=25ca lrm=200e lsaquo=2039 lsquo=2018 \
    mdash=2014 minus=2212 mu=3bc nabla=2207 ndash=2013 ne=2260 ni=220b notin=2209 nsub=2284 nu=3bd \
    oelig=153 oline=203e omega=3c9 omicron=3bf oplus=2295 or=2228 otimes=2297 part=2202 permil=2030 \
    perp=22a5 phi=3c6 pi=3c0 piv=3d6 prime=2032 prod=220f prop=221d psi=3c8 rArr=21d2 radic=221a \
    rang=27e9 rarr=2192 rceil=2309 rdquo=201d real=211c rfloor=230b rho=3c1 rlm=200f rsaquo=203a \
    rsquo=2019 sbquo=201a scaron=161 sdot=22c5 sigma=3c3 sigmaf=3c2 sim=223c spades=2660 sub=2282 \
    sube=2286 sum=2211 sup=2283 supe=2287 tau=3c4 there4=2234 theta=3b8 thetasym=3d1 thinsp=2009 \
    tilde=2dc trade=2122 uArr=21d1 uarr=2191 upsih=3d2 upsilon=3c5 weierp=2118 xi=3be zeta=3b6 zwj=200d \
    zwnj=200c\
    ";

/// What the numbers 128 to 159 mean: those of windows-1252, 0 where it has none.
const WINDOWS: [u16; 32] = [
    0x20ac, 0, 0x201a, 0x0192, 0x201e, 0x2026, 0x2020, 0x2021, 0x02c6, 0x2030, 0x0160, 0x2039, 0x0152, 0,
    0x017d, 0, 0, 0x2018, 0x2019, 0x201c, 0x201d, 0x2022, 0x2013, 0x2014, 0x02dc, 0x2122, 0x0161, 0x203a,
    0x0153, 0, 0x017e, 0x0178,
];

/// What a character of 128 to 159 is in windows-1252, itself where that has none.
#[must_use]
pub fn windows(c: char) -> char {
    let code = u32::from(c).checked_sub(0x80).and_then(|at| WINDOWS.get(at as usize)).copied();
    code.filter(|&code| code > 0).and_then(|code| char::from_u32(code.into())).unwrap_or(c)
}

/// Replaces every reference that is known once; what a replacement makes is not looked at again.
#[must_use]
pub fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let read = if let Some(number) = rest.strip_prefix('#') {
            number_of(number).map(|(text, length)| (text, length + 1))
        } else {
            name_of(rest)
        };
        match read {
            Some((text, length)) => {
                out.push_str(&text);
                rest = &rest[length..];
            }
            None => out.push('&'),
        }
    }
    out.push_str(rest);
    out
}

/// The character of a number after `&#`, and how long it stands in the text.
fn number_of(text: &str) -> Option<(String, usize)> {
    let (digits, radix, before) = match text.strip_prefix(['x', 'X']) {
        Some(digits) => (digits, 16, 1),
        None => (text, 10, 0),
    };
    let length = digits.find(|c: char| !c.is_digit(radix)).unwrap_or(digits.len());
    if length == 0 {
        return None;
    }
    let semicolon = usize::from(digits[length..].starts_with(';'));
    let number = u32::from_str_radix(&digits[..length], radix).unwrap_or(u32::MAX);
    Some((character(number), before + length + semicolon))
}

fn character(number: u32) -> String {
    match number {
        0 => char::REPLACEMENT_CHARACTER.to_string(),
        1..=8 | 0xb | 0xe..=0x1f | 0x7f | 0xfdd0..=0xfdef => String::new(),
        _ if number & 0xfffe == 0xfffe && number <= 0x10_ffff => String::new(),
        _ => char::from_u32(number).map_or(char::REPLACEMENT_CHARACTER, windows).to_string(),
    }
}

/// The character of the longest known name at the beginning, and how long it stands in the text.
fn name_of(text: &str) -> Option<(String, usize)> {
    const MOST: usize = 32;
    let end = text.char_indices().find(|(i, c)| *i >= MOST || !c.is_ascii_alphanumeric());
    let name = &text[..end.map_or(text.len(), |(i, _)| i)];
    if text[name.len()..].starts_with(';')
        && let Some(found) = look_up(LEGACY, name).or_else(|| look_up(OTHERS, name))
    {
        return Some((found.to_string(), name.len() + 1));
    }
    let lengths = (2..=name.len()).rev();
    lengths.into_iter().find_map(|length| Some((look_up(LEGACY, &name[..length])?.to_string(), length)))
}

fn look_up(table: &str, name: &str) -> Option<char> {
    let code = table.split(' ').find_map(|entry| entry.strip_prefix(name)?.strip_prefix('='))?;
    char::from_u32(u32::from_str_radix(code, 16).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Python's `html.unescape` gives.
    #[test]
    fn references_are_read_as_the_standard_reads_them() {
        for (text, want) in [
            ("a &lt; b &amp;&amp; c &gt; d", "a < b && c > d"),
            ("&amp;lt;", "&lt;"),
            ("caf&eacute; caf&#233; caf&#xE9; caf&#xe9", "caf\u{e9} caf\u{e9} caf\u{e9} caf\u{e9}"),
            ("&ampersand &notit; &copy2024", "&ersand \u{ac}it; \u{a9}2024"),
            ("&hearts; &hearts &unknown; & &; &#; &#x;", "\u{2665} &hearts &unknown; & &; &#; &#x;"),
            ("&#128;&#0;&#1;&#x110000;&#xD800;&#99999999999;", "\u{20ac}\u{fffd}\u{fffd}\u{fffd}\u{fffd}"),
            ("&", "&"),
            ("&\u{e9};", "&\u{e9};"),
        ] {
            assert_eq!(unescape(text), want, "{text}");
        }
    }
}
