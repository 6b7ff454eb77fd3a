import Foundation
import TTTReference

/// What this module has beside Apple's interface: which model directory runs behind a bundle.
public final class StandIn: @unchecked Sendable {
    public static let shared = StandIn()

    private let lock = NSLock()
    private var sources: [String: URL] = [:]
    private var hook: (@Sendable () async -> Void)?

    private var copied = 0

    private init() {}

    /// How many arrays have been copied because somebody else had them too.
    public var copies: Int { lock.withLock { copied } }

    func countCopy() {
        lock.withLock { copied += 1 }
    }

    /// - Parameter source: the model directory that the bundle was exported from.
    public func register(_ source: URL, for bundle: URL) {
        lock.withLock { sources[bundle.standardizedFileURL.path] = source }
    }

    /// Called in the midst of each prediction; for tests.
    public func whilePredicting(_ hook: (@Sendable () async -> Void)?) {
        lock.withLock { self.hook = hook }
    }

    func predictionBegins() async {
        let hook = lock.withLock { self.hook }
        await hook?()
    }

    func network(of bundle: URL) throws -> ReferenceNetwork {
        guard let source = lock.withLock({ sources[bundle.standardizedFileURL.path] }) else {
            throw StandInError("\(bundle.lastPathComponent): no model directory is registered for it")
        }
        return try ReferenceNetwork(directory: source)
    }
}

/// What the stand-in refuses, where Core AI would refuse it too or go wrong.
public struct StandInError: LocalizedError {
    public let errorDescription: String?

    init(_ what: String) {
        errorDescription = what
    }
}
