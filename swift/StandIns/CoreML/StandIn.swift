import Foundation
import TTTReference

/// What this module has beside Apple's interface: which model directory runs behind a package.
public final class StandIn: @unchecked Sendable {
    public static let shared = StandIn()

    private let lock = NSLock()
    private var sources: [String: URL] = [:]
    private var networks: [String: ReferenceNetwork] = [:]
    private var hook: (@Sendable () -> Void)?
    private var loads = 0

    private init() {}

    /// - Parameter source: the model directory that the package was exported from.
    public func register(_ source: URL, for package: URL) {
        lock.withLock { sources[package.standardizedFileURL.path] = source }
    }

    /// Called in the midst of each prediction with a state; for tests.
    public func whilePredicting(_ hook: (@Sendable () -> Void)?) {
        lock.withLock { self.hook = hook }
    }

    /// How many functions of packages have been loaded; for tests.
    public var loadedFunctions: Int { lock.withLock { loads } }

    func functionIsLoaded() {
        lock.withLock { loads += 1 }
    }

    func predictionBegins() {
        lock.withLock { hook }?()
    }

    func network(of package: URL) throws -> ReferenceNetwork {
        try lock.withLock {
            guard let source = sources[package.standardizedFileURL.path] else {
                throw StandInError("\(package.lastPathComponent): no model directory is registered for it")
            }
            if let network = networks[source.path] { return network }
            let network = try ReferenceNetwork(directory: source)
            networks[source.path] = network
            return network
        }
    }
}
