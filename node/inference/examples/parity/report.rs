//! Rows of a comparison, and how they are printed.

use std::fmt;

/// What became of a golden tensor.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Verdict {
    /// Compared: the largest absolute difference, and the tolerance.
    Compared { difference: f64, tolerance: f64 },
    /// Not compared, and why.
    NotCompared(String),
}

/// A golden tensor's row.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    golden: String,
    tensor: String,
    verdict: Verdict,
}

impl Row {
    pub(crate) fn compared(golden: &str, tensor: &str, difference: f64, tolerance: f64) -> Self {
        let verdict = Verdict::Compared { difference, tolerance };
        Self { golden: golden.to_owned(), tensor: tensor.to_owned(), verdict }
    }

    pub(crate) fn not_compared(golden: &str, tensor: &str, reason: String) -> Self {
        Self { golden: golden.to_owned(), tensor: tensor.to_owned(), verdict: Verdict::NotCompared(reason) }
    }

    pub(crate) fn passes(&self) -> bool {
        match self.verdict {
            Verdict::Compared { difference, tolerance } => difference <= tolerance,
            Verdict::NotCompared(_) => false,
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "  {:<26} {:<40} ", self.golden, self.tensor)?;
        match &self.verdict {
            Verdict::Compared { difference, tolerance } => {
                let word = if self.passes() { "ok" } else { "FAIL" };
                write!(f, "{difference:>10.2e} {tolerance:>10.2e}  {word}")
            }
            Verdict::NotCompared(reason) => write!(f, "not compared: {reason}  FAIL"),
        }
    }
}

/// All rows of a folder.
#[derive(Debug, Default)]
pub(crate) struct Report {
    rows: Vec<Row>,
}

impl Report {
    pub(crate) fn push(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// Rows that differ or were not compared.
    pub(crate) fn bad(&self) -> usize {
        self.rows.iter().filter(|row| !row.passes()).count()
    }

    /// All rows.
    #[cfg_attr(not(test), expect(dead_code, reason = "the tests count rows, the example prints them"))]
    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  {:<26} {:<40} {:>10} {:>10}", "golden", "tensor", "max |diff|", "tolerance")?;
        for row in &self.rows {
            writeln!(f, "{row}")?;
        }
        write!(f, "  {} tensors, {} fail", self.rows.len(), self.bad())
    }
}
