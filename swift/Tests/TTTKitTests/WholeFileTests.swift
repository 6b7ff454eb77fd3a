import Foundation
import XCTest

@testable import TTTKit

final class WholeFileTests: XCTestCase {
    private let folder = FileManager.default.temporaryDirectory.appendingPathComponent("whole-\(UUID().uuidString)")

    override func setUpWithError() throws {
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    }

    override func tearDownWithError() throws {
        try FileManager.default.removeItem(at: folder)
    }

    private var names: [String] {
        get throws { try FileManager.default.contentsOfDirectory(atPath: folder.path).sorted() }
    }

    func testReplacesAFileAndLeavesNothing() throws {
        let file = folder.appendingPathComponent("a.state")
        for text in ["one", "another"] {
            try WholeFile.write(Data(text.utf8), to: file)
            XCTAssertEqual(try Data(contentsOf: file), Data(text.utf8))
            XCTAssertEqual(try names, ["a.state"])
        }
    }

    func testAFailureLeavesTheOlderFile() throws {
        let file = folder.appendingPathComponent("a.state")
        try FileManager.default.createDirectory(at: file, withIntermediateDirectories: true)
        try Data("x".utf8).write(to: file.appendingPathComponent("inside"))
        XCTAssertThrowsError(try WholeFile.write(Data("one".utf8), to: file))  // a file cannot take a folder's place
        XCTAssertEqual(try names, ["a.state"])
        XCTAssertThrowsError(try WholeFile.write(Data(), to: folder.appendingPathComponent("nowhere/a.state")))
    }

    /// A process that saves two states in turns is killed at all moments: a file is there, and it is one of the two.
    func testAStateStaysWholeWhenTheProcessIsKilled() throws {
        let bundle = Bundle(for: Self.self).bundleURL  // on a Mac the tests, on Linux the folder that they are in
        let places = [bundle, bundle.deletingLastPathComponent()].map { $0.appendingPathComponent("TTTTrials") }
        let trials = try XCTUnwrap(places.first { FileManager.default.isExecutableFile(atPath: $0.path) })
        let file = folder.appendingPathComponent("book.state")
        var seen: Set<Int> = []
        var leftovers = 0
        for round in 0..<20 {
            let child = Process()
            child.executableURL = trials
            child.arguments = ["save", file.path]
            try child.run()
            while !FileManager.default.fileExists(atPath: file.path) { usleep(500) }
            usleep(30_000 + UInt32(round) * 1_700)
            kill(child.processIdentifier, SIGKILL)
            child.waitUntilExit()
            seen.insert(try TextState(contentsOf: file).tokens.count)
            XCTAssertTrue(Set(try names).isSubset(of: ["book.state", ".book.state.partial"]))
            leftovers += try names.count - 1
        }
        XCTAssertTrue(seen.isSubset(of: [10, 11]), "\(seen)")
        print("killed 20 times, \(leftovers) times in the midst of writing")
    }
}
