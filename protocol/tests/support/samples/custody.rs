//! Messages of custody: what is kept for others, and what is asked of those who keep.

use super::*;

pub(super) fn custody(d: &mut Draw) -> Custody {
    Custody { job: job_id(d), custodian: node(d), runs_at: node_address(d), issued_at: d.at() }
}

pub(super) fn keep(d: &mut Draw) -> Keep {
    Keep {
        job: job_id(d),
        requester: requester(d),
        holder: node(d),
        content: content(d),
        sealed: blob(d),
        statement: Bytes::new(d.bytes::<40>().to_vec()).unwrap(),
        until: d.at(),
        issued_at: d.at(),
    }
}

pub(super) fn content(d: &mut Draw) -> Content {
    [Content::Clip, Content::Latents, Content::Checkpoint, Content::Input(1)][d.below(4) as usize]
}

pub(super) fn mirrored(d: &mut Draw) -> MirroredInputs {
    let input = |d: &mut Draw| SealedInput { input: blob(d).id, sealed: blob(d) };
    MirroredInputs { holder: node_address(d), inputs: d.list(input) }
}

pub(super) fn held(d: &mut Draw) -> Held {
    let item = |d: &mut Draw| HeldItem {
        content: content(d),
        sealed: blob(d),
        statement: Bytes::new(d.bytes::<40>().to_vec()).unwrap(),
    };
    Held { items: d.list(item), runs_at: d.some(node_address) }
}

pub(super) fn requests_of_custody(d: &mut Draw) -> List<Request, 16> {
    let list = ListName { publisher: d.keypair().public(), kind: ListKind::Models };
    List::first_of([
        Request::Custody { custody: envelope(d), job: envelope(d) },
        Request::Keep(envelope(d)),
        Request::Held(envelope(d)),
        Request::Forget(envelope(d)),
        Request::Look(Look { addresses: d.list(Draw::text), quote: d.some(quote_request) }),
        Request::List(list),
        Request::Release { lease: lease(d), reason: ReleaseReason::Sooner(d.millis()) },
        Request::Release { lease: lease(d), reason: ReleaseReason::Latency },
        Request::Release { lease: lease(d), reason: ReleaseReason::Reliability },
    ])
}

pub(super) fn responses_of_custody(d: &mut Draw) -> List<Response, 16> {
    List::first_of([
        Response::Kept { until: d.at() },
        Response::Held(held(d)),
        Response::Forgotten { job: job_id(d) },
        Response::Seen(Seen { reached: d.flag(), quoted: d.flag(), text: d.text() }),
        Response::List(envelope(d)),
    ])
}
