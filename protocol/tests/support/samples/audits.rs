//! Messages of audits.

use super::*;

pub(super) fn audit_request(d: &mut Draw) -> AuditRequest {
    AuditRequest {
        job: job_id(d),
        receipt: ReceiptId::from_bytes(d.bytes()),
        node: node(d),
        step: d.u32(),
        issued_at: UnixMillis(d.u64()),
        nonce: Nonce::from_bytes(d.bytes()),
    }
}

pub(super) fn audit_grant(d: &mut Draw) -> AuditGrant {
    AuditGrant {
        job: job_id(d),
        receipt: ReceiptId::from_bytes(d.bytes()),
        auditor: PublicKey::from(node(d)),
        issued_at: UnixMillis(d.u64()),
        expires_at: UnixMillis(d.u64()),
    }
}

pub(super) fn opening(d: &mut Draw) -> Opening {
    Opening {
        index: d.u32(),
        latents: blob_id(d),
        sealed: blob(d),
        proof: Proof(d.list(|d| Leaf(d.bytes()))),
    }
}

pub(super) fn requests_of_audit(d: &mut Draw) -> List<Request, 16> {
    List::first_of([Request::Audit { request: envelope(d), grant: d.some(envelope) }])
}

pub(super) fn requests_of_lists(d: &mut Draw) -> List<Request, 16> {
    List::first_of([Request::Publish(envelope(d))])
}

pub(super) fn responses_of_audit(d: &mut Draw) -> List<Response, 16> {
    List::first_of([Response::Audit(AuditReply { leaves: d.u64(), openings: d.list(opening) })])
}

pub(super) fn audit_outcome(d: &mut Draw) -> AuditOutcome {
    use AuditDifference::{Frames, Opening, Start, Step};
    use AuditObstacle::{Auditor, Unreachable, Withheld};
    match d.below(3) {
        0 => AuditOutcome::Honest,
        1 => AuditOutcome::Differs([Opening, Start, Step, Frames][d.below(4) as usize]),
        _ => AuditOutcome::CouldNotLook {
            obstacle: [Withheld, Unreachable, Auditor][d.below(3) as usize],
            why: d.text(),
        },
    }
}

pub(super) fn audit_verdict(d: &mut Draw) -> AuditVerdict {
    AuditVerdict {
        job: job_id(d),
        receipt: ReceiptId::from_bytes(d.bytes()),
        maker: node(d),
        auditor: node(d),
        step: d.u32(),
        outcome: audit_outcome(d),
        deviation: Micro(d.u64() as i64),
        tolerance: Micro(d.u64() as i64),
        precision: [AuditPrecision::Full, AuditPrecision::Half][d.below(2) as usize],
        looked_at: d.at(),
    }
}

pub(super) fn audit_order(d: &mut Draw) -> AuditOrder {
    AuditOrder { job: envelope(d), receipt: envelope(d), grant: envelope(d), maker: node_address(d) }
}

pub(super) fn requests_of_order_audit(d: &mut Draw) -> List<Request, 16> {
    List::first_of([Request::OrderAudit(Box::new(audit_order(d)))])
}

pub(super) fn responses_of_order_audit(d: &mut Draw) -> List<Response, 16> {
    List::first_of([
        Response::AuditState(AuditState::Waiting),
        Response::AuditState(AuditState::Looking),
        Response::AuditState(AuditState::Done(envelope(d))),
    ])
}
