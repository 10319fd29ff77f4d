//! Boxes of an MP4 file (ISO/IEC 14496-12): walking them without believing them.

use std::ops::Range;

/// Deepest nesting that is walked.
const MAX_DEPTH: usize = 8;
/// Containers on the way from the file to a track's sample tables.
const CONTAINERS: [&[u8; 4]; 5] = [b"moov", b"trak", b"mdia", b"minf", b"stbl"];
/// Tables whose entries a reader will allocate, and the least bytes that one entry takes in the file.
const TABLES: [(&[u8; 4], usize, usize); 6] = [
    // name, offset of the count within the content, bytes of an entry
    (b"stts", 4, 8),
    (b"ctts", 4, 8),
    (b"stsc", 4, 12),
    (b"stco", 4, 4),
    (b"co64", 4, 8),
    (b"stss", 4, 4),
];

/// One box: where it lies, head included, and where its content begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mp4Box {
    pub(crate) name: [u8; 4],
    pub(crate) range: Range<usize>,
    pub(crate) content: Range<usize>,
}

/// The boxes of this range, which must fill it exactly; else where and how they do not.
pub(crate) fn boxes(bytes: &[u8], range: Range<usize>) -> Result<Vec<Mp4Box>, String> {
    let mut boxes = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let head = bytes.get(at..at + 8).filter(|_| at + 8 <= range.end);
        let head = head.ok_or_else(|| format!("at byte {at}: {} bytes that are no box", range.end - at))?;
        let short = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as u64;
        let name = [head[4], head[5], head[6], head[7]];
        let (len, head_len) = match short {
            1 => {
                let long = bytes.get(at + 8..at + 16).and_then(|long| long.try_into().ok());
                (long.map_or(0, u64::from_be_bytes), 16)
            }
            len => (len, 8),
        };
        let end = usize::try_from(len).ok().and_then(|len| at.checked_add(len));
        let end = end.filter(|end| *end <= range.end && len >= head_len as u64).ok_or_else(|| {
            format!("at byte {at}: box {:?} of {len} bytes does not fit its place", text(&name))
        })?;
        boxes.push(Mp4Box { name, range: at..end, content: at + head_len..end });
        at = end;
    }
    Ok(boxes)
}

/// A copy whose boxes of free-form metadata are named as free space: a reader skips them. Nothing that a clip is checked
/// for stands in them, and the reader of others never ends on some damaged ones.
pub(crate) fn without_metadata(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let mut copy = bytes.to_vec();
    let mut open = vec![(0..bytes.len(), 0)];
    while let Some((range, depth)) = open.pop() {
        for found in boxes(bytes, range)? {
            if matches!(&found.name, b"udta" | b"meta") {
                copy[found.range.start + 4..found.range.start + 8].copy_from_slice(b"free");
            } else if CONTAINERS.contains(&&found.name) && depth < MAX_DEPTH {
                open.push((found.content, depth + 1));
            }
        }
    }
    Ok(copy)
}

/// Checks that no table of the file claims more entries than it holds bytes for, so that a reader that believes
/// the file cannot be made to allocate beyond the file's own size.
pub(crate) fn check_tables(bytes: &[u8]) -> Result<(), String> {
    let mut open = vec![(0..bytes.len(), 0)];
    while let Some((range, depth)) = open.pop() {
        let boxes = boxes(bytes, range)?;
        check_samples(bytes, &boxes)?;
        for found in boxes {
            if CONTAINERS.contains(&&found.name) {
                if depth == MAX_DEPTH {
                    return Err(format!("boxes nested deeper than {MAX_DEPTH}"));
                }
                open.push((found.content, depth + 1));
            } else {
                check_table(bytes, &found)?;
            }
        }
    }
    Ok(())
}

/// Checks that the tables of one track speak of the same number of samples, so that a reader that unfolds their runs
/// ends: a run of four thousand million samples takes eight bytes. Fragments, which could do the same, are no clips.
fn check_samples(bytes: &[u8], boxes: &[Mp4Box]) -> Result<(), String> {
    let named = |name: &[u8; 4]| boxes.iter().find(|found| found.name == *name);
    if named(b"moof").is_some() {
        return Err("a fragmented file, which is no clip".to_owned());
    }
    let Some(sizes) = named(b"stsz") else { return Ok(()) };
    let samples = word(bytes, sizes, 8).unwrap_or(0);
    for (name, entry, run_at) in [(b"stts", 8, 0), (b"ctts", 8, 0), (b"stsc", 12, 4)] {
        let Some(table) = named(name) else { continue };
        let entries = word(bytes, table, 4).unwrap_or(0).min(table.content.len() as u64 / entry);
        let runs = (0..entries).filter_map(|index| word(bytes, table, 8 + (index * entry) as usize + run_at));
        let given = if name == b"stsc" { runs.max().unwrap_or(0) } else { runs.sum() };
        if given > samples {
            return Err(format!("box {:?} speaks of {given} samples, the track has {samples}", text(name)));
        }
    }
    Ok(())
}

/// The number at this offset of a box's content.
fn word(bytes: &[u8], of: &Mp4Box, offset: usize) -> Option<u64> {
    let word = bytes[of.content.clone()].get(offset..offset + 4)?.try_into().ok()?;
    Some(u64::from(u32::from_be_bytes(word)))
}

fn check_table(bytes: &[u8], found: &Mp4Box) -> Result<(), String> {
    let content = &bytes[found.content.clone()];
    let number = |offset: usize| {
        let word = content.get(offset..offset + 4).and_then(|word| word.try_into().ok());
        word.map(u32::from_be_bytes).map(|n| n as usize)
    };
    let too_many = |given: usize| {
        format!("box {:?} claims {given} entries in {} bytes", text(&found.name), content.len())
    };
    if &found.name == b"stsz" {
        let (each, count) = number(4).zip(number(8)).ok_or_else(|| too_many(0))?;
        // With one size for all samples the table is empty: then the samples must fit the file.
        let fits = count <= bytes.len().checked_div(each).unwrap_or(content.len() / 4);
        return if fits { Ok(()) } else { Err(too_many(count)) };
    }
    match TABLES.iter().find(|(name, ..)| **name == found.name) {
        Some((_, offset, entry)) => {
            let count = number(*offset).ok_or_else(|| too_many(0))?;
            if count <= content.len() / entry { Ok(()) } else { Err(too_many(count)) }
        }
        None => Ok(()),
    }
}

fn text(name: &[u8; 4]) -> String {
    name.iter().map(|b| if b.is_ascii_graphic() { char::from(*b) } else { '?' }).collect()
}
