//! `kinoflock ops`: the operations that a job may ask for by name.

use kinoflock_protocol::ops::{OPS, OpInfo};
use serde::Serialize;

use super::context::Context;
use crate::output::table::{self, Column};

#[derive(Serialize)]
struct Row {
    event: &'static str,
    name: &'static str,
    takes: &'static str,
    help: &'static str,
}

pub(super) fn run(context: &Context<'_>) {
    for op in OPS {
        let (name, takes, help) = (op.name, op.kind.name(), op.help);
        context.out.record(&Row { event: "operation", name, takes, help });
    }
    let columns = [Column::Left("operation"), Column::Left("takes"), Column::Left("what it does")];
    let row = |op: &OpInfo| vec![op.name.to_owned(), op.kind.name().to_owned(), op.help.to_owned()];
    let rows: Vec<_> = OPS.iter().map(row).collect();
    table::lines(&columns, &rows).iter().for_each(|line| context.out.line(line));
}
