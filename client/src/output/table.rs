//! Tables of plain text: columns as wide as their widest cell, numbers to the right.

/// Space between two columns.
const GAP: usize = 2;

/// A column: its heading, and to which side its cells are put.
#[derive(Debug, Clone, Copy)]
pub enum Column {
    /// Words: to the left.
    Left(&'static str),
    /// Numbers: to the right.
    Right(&'static str),
}

/// The lines of a table, the heading first. Control characters in cells, which come from others, are not printed.
#[must_use]
pub fn lines(columns: &[Column], rows: &[Vec<String>]) -> Vec<String> {
    let heads: Vec<String> = columns.iter().map(|column| column.name().to_owned()).collect();
    let clean = |cell: &String| cell.chars().filter(|c| !c.is_control()).collect::<String>();
    let rows = rows.iter().map(|row| row.iter().map(clean).collect::<Vec<_>>());
    let all: Vec<Vec<String>> = std::iter::once(heads).chain(rows).collect();
    let width = |column: usize| {
        all.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(columns).zip(&widths).map(|((cell, column), width)| match column {
            Column::Left(_) => format!("{cell:<width$}"),
            Column::Right(_) => format!("{cell:>width$}"),
        });
        cells.collect::<Vec<_>>().join(&" ".repeat(GAP)).trim_end().to_owned()
    };
    all.iter().map(line).collect()
}

impl Column {
    fn name(&self) -> &'static str {
        match self {
            Self::Left(name) | Self::Right(name) => name,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_under_each_other_and_numbers_to_the_right() {
        let rows =
            [["attic", "1.2 s"], ["b\u{1b}[31märn", "12 min 5 s"]].map(|row| row.map(String::from).to_vec());
        let lines = lines(&[Column::Left("node"), Column::Right("ready in")], &rows);
        assert_eq!(lines, ["node        ready in", "attic          1.2 s", "b[31märn  12 min 5 s"]);
    }
}
