//! Reads SentencePiece's `spiece.model`, a protocol buffer, as far as a unigram tokenizer needs it.
//!
//! Fields (sentencepiece_model.proto): `ModelProto.pieces = 1` (piece 1, score 2, type 3), `trainer_spec = 2`
//! (model_type 3, unk_id 40), `normalizer_spec = 3` (precompiled_charsmap 2). Every length is checked against what is
//! left of the file before anything is taken.

/// What a piece is; numbers as in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PieceKind {
    /// A piece of text.
    Normal,
    /// What stands for everything that no piece matches.
    Unknown,
    /// A mark such as the end of a text.
    Control,
    /// Matched in the text as it is.
    UserDefined,
    /// Never produced.
    Unused,
    /// A single byte.
    Byte,
}

/// One entry of the vocabulary.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    /// Its text, spaces written as U+2581.
    pub text: String,
    /// Its log probability.
    pub score: f32,
    /// What it is.
    pub kind: PieceKind,
}

/// A unigram model.
#[derive(Debug, Clone, PartialEq)]
pub struct SentencePiece {
    /// The vocabulary; a piece's index is its token id.
    pub pieces: Vec<Piece>,
    /// The id of the unknown piece.
    pub unk_id: usize,
    /// The normaliser's table, empty where text is taken as it is.
    pub charsmap: Vec<u8>,
}

/// SentencePiece's own number for unigram models.
const UNIGRAM: u64 = 1;

impl SentencePiece {
    /// Reads a model.
    ///
    /// # Errors
    /// A text that says what is wrong: cut short, not a protocol buffer, not a unigram model, no pieces.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut model = Self { pieces: Vec::new(), unk_id: 0, charsmap: Vec::new() };
        let mut reader = Reader { bytes };
        while let Some((field, value)) = reader.next_field()? {
            match (field, value) {
                (1, Value::Bytes(bytes)) => model.pieces.push(piece(bytes)?),
                (2, Value::Bytes(bytes)) => model.unk_id = trainer(bytes)?,
                (3, Value::Bytes(bytes)) => model.charsmap = charsmap(bytes)?,
                _ => {}
            }
        }
        if model.unk_id >= model.pieces.len() {
            return Err(format!("unk_id is {}, there are {} pieces", model.unk_id, model.pieces.len()));
        }
        Ok(model)
    }
}

fn piece(bytes: &[u8]) -> Result<Piece, String> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: PieceKind::Normal };
    let mut reader = Reader { bytes };
    while let Some((field, value)) = reader.next_field()? {
        match (field, value) {
            (1, Value::Bytes(text)) => {
                piece.text =
                    std::str::from_utf8(text).map_err(|_| "a piece is not UTF-8".to_owned())?.to_owned();
            }
            (2, Value::Fixed32(bits)) => piece.score = f32::from_bits(bits),
            (3, Value::Varint(kind)) => piece.kind = kind_of(kind)?,
            _ => {}
        }
    }
    Ok(piece)
}

fn kind_of(number: u64) -> Result<PieceKind, String> {
    Ok(match number {
        1 => PieceKind::Normal,
        2 => PieceKind::Unknown,
        3 => PieceKind::Control,
        4 => PieceKind::UserDefined,
        5 => PieceKind::Unused,
        6 => PieceKind::Byte,
        other => return Err(format!("piece type {other} is not known")),
    })
}

/// The unknown piece's id; other model types than unigram are refused.
fn trainer(bytes: &[u8]) -> Result<usize, String> {
    let mut unk_id = 0;
    let mut reader = Reader { bytes };
    while let Some((field, value)) = reader.next_field()? {
        match (field, value) {
            (3, Value::Varint(kind)) if kind != UNIGRAM => {
                return Err(format!("model_type is {kind}, only {UNIGRAM} (unigram) is known"));
            }
            (40, Value::Varint(id)) => {
                unk_id = usize::try_from(id).map_err(|_| "unk_id is too large".to_owned())?
            }
            _ => {}
        }
    }
    Ok(unk_id)
}

fn charsmap(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let mut map = Vec::new();
    let mut reader = Reader { bytes };
    while let Some((field, value)) = reader.next_field()? {
        if let (2, Value::Bytes(bytes)) = (field, value) {
            map = bytes.to_vec();
        }
    }
    Ok(map)
}

enum Value<'a> {
    Varint(u64),
    Fixed32(u32),
    Fixed64,
    Bytes(&'a [u8]),
}

struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    /// The next field and its value, `None` at the end.
    fn next_field(&mut self) -> Result<Option<(u64, Value<'a>)>, String> {
        if self.bytes.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Value::Varint(self.varint()?),
            1 => {
                self.take(8)?;
                Value::Fixed64
            }
            2 => {
                let length = self.varint()?;
                Value::Bytes(
                    self.take(usize::try_from(length).map_err(|_| "a length is too large".to_owned())?)?,
                )
            }
            5 => {
                let bytes = self.take(4)?;
                Value::Fixed32(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            }
            other => return Err(format!("wire type {other} is not known: this is no SentencePiece model")),
        };
        Ok(Some((key >> 3, value)))
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("a number is longer than 64 bits".to_owned())
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        if count > self.bytes.len() {
            return Err(format!("cut short: {count} bytes are needed, {} are left", self.bytes.len()));
        }
        let (head, tail) = self.bytes.split_at(count);
        self.bytes = tail;
        Ok(head)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn sample() -> Vec<u8> {
        let mut bytes = vec![0x0a, 8, 0x0a, 1, b'a', 0x15];
        bytes.extend((-1.5f32).to_le_bytes());
        bytes.extend([0x12, 5, 0x18, 1, 0xc0, 0x02, 0, 0x1a, 3, 0x12, 1, 9]);
        bytes
    }

    #[test]
    fn pieces_scores_and_charsmap_are_read() {
        let model = SentencePiece::parse(&sample()).unwrap();
        assert_eq!(model.pieces, [Piece { text: "a".to_owned(), score: -1.5, kind: PieceKind::Normal }]);
        assert_eq!((model.unk_id, model.charsmap), (0, vec![9]));
    }

    #[test]
    fn a_file_that_is_cut_or_changed_is_never_a_panic() {
        let bytes = sample();
        for end in 0..bytes.len() {
            let _ = SentencePiece::parse(&bytes[..end]);
            for value in [0u8, 7, 0x7f, 0xff] {
                let mut changed = bytes.clone();
                changed[end] = value;
                let _ = SentencePiece::parse(&changed);
            }
        }
        assert!(SentencePiece::parse(&[]).is_err());
        assert!(SentencePiece::parse(&bytes[..5]).unwrap_err().contains("cut short"));
    }

    #[test]
    fn a_model_of_another_kind_is_refused_by_its_number() {
        let mut bytes = sample();
        let at = bytes.iter().rposition(|&byte| byte == 0x18).unwrap();
        bytes[at + 1] = 2;
        assert!(SentencePiece::parse(&bytes).unwrap_err().contains("model_type is 2"));
    }
}
